"""Accounts of programs, and simulated raters who know what the test's texts are worth."""

from __future__ import annotations

from starlette.testclient import TestClient

from tastemaker.labelling.web import Services
from tastemaker.raters import SimulatedRater, average
from tastemaker.records import Prompt, Response
from tastemaker.store.audit import COMMAND_LINE

GROUP = "simulated"


def token_of(services: Services, name: str) -> str:
    """An API token of an account that is there."""
    (account,) = [each for each in services.access.accounts() if each.name == name]
    return services.access.create_api_token(account, "test")


def simulated_token(services: Services, name: str, group: str = GROUP) -> str:
    """The API token of a new simulated rater."""
    account = services.access.create_service(name, rater_group=group, actor=COMMAND_LINE)
    return services.access.create_api_token(account, "test", actor=COMMAND_LINE)


def features(prompt: Prompt, response: Response) -> dict[str, float]:
    """Uses what no person may see: whether the private record knows a truth, and whether the response was cut off."""
    return {"finished": float(response.finished and "truth" in prompt.about.extra), "late": float(response.text[5])}


def simulated(name: str, group: str = GROUP) -> SimulatedRater:
    profile = average(name, group=group, weights={"finished": 2.0, "late": 0.3}, noise=0.5)
    return SimulatedRater(profile, 7, features, write=lambda prompt, seed: f"{prompt.about.extra['truth']} {seed}")


class Program(TestClient):
    """A program with an API token, or none."""

    __test__ = False

    def __init__(self, app: object, origin: str, token: str | None) -> None:
        super().__init__(app, base_url=origin, follow_redirects=False)  # type: ignore[arg-type]
        if token is not None:
            self.headers["authorization"] = f"Bearer {token}"
