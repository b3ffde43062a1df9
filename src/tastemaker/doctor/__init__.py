"""Says in plain words what looks wrong with a run, from what it has measured: `examine` a folder, get its findings.

A finding is of a kind (`KINDS`), each with the threshold that it is held to and the reason for it. Two sorts of checks:
what no correct run shows, whatever is trained on whatever data (`exact`), and what training that goes well does not do
(`course` for PPO, `supervised` for the rest), whose thresholds were set on runs broken on purpose and on healthy ones.
Nothing here imports torch.
"""

from tastemaker.doctor.examine import KINDS as KINDS
from tastemaker.doctor.examine import Diagnosis as Diagnosis
from tastemaker.doctor.examine import diagnose as diagnose
from tastemaker.doctor.examine import examine as examine
from tastemaker.doctor.findings import Finding as Finding
from tastemaker.doctor.findings import Kind as Kind
