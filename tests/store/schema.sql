CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL, 
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
CREATE TABLE raters (
    id INTEGER NOT NULL, 
    name TEXT NOT NULL, 
    rater_group TEXT NOT NULL, 
    origin TEXT NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_raters PRIMARY KEY (id), 
    CONSTRAINT uq_raters_name UNIQUE (name), 
    CONSTRAINT ck_raters_origin CHECK (origin IN ('human', 'simulated'))
);
CREATE TABLE guidelines (
    version TEXT NOT NULL, 
    text JSON NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_guidelines PRIMARY KEY (version)
);
CREATE TABLE studies (
    id INTEGER NOT NULL, 
    name TEXT NOT NULL, 
    kind TEXT NOT NULL, 
    purpose TEXT NOT NULL, 
    guideline_version TEXT NOT NULL, 
    overlap INTEGER NOT NULL, 
    rater_group TEXT NOT NULL, 
    lease_seconds DOUBLE NOT NULL, 
    created_at DOUBLE NOT NULL, screening BOOLEAN DEFAULT 0 NOT NULL, gold_share DOUBLE DEFAULT '0' NOT NULL, closed_at DOUBLE, secret TEXT DEFAULT '' NOT NULL, 
    CONSTRAINT pk_studies PRIMARY KEY (id), 
    CONSTRAINT uq_studies_name UNIQUE (name), 
    CONSTRAINT fk_studies_guideline_version FOREIGN KEY(guideline_version) REFERENCES guidelines (version), 
    CONSTRAINT ck_studies_kind CHECK (kind IN ('demonstration', 'ranking', 'comparison', 'rating')), 
    CONSTRAINT ck_studies_purpose CHECK (purpose IN ('training', 'evaluation')), 
    CONSTRAINT ck_studies_overlap CHECK (overlap >= 1)
);
CREATE TABLE items (
    id INTEGER NOT NULL, 
    study_id INTEGER NOT NULL, 
    position INTEGER NOT NULL, 
    "key" TEXT NOT NULL, 
    messages JSON NOT NULL, 
    category JSON, 
    private JSON NOT NULL, 
    content_hash TEXT NOT NULL, 
    CONSTRAINT pk_items PRIMARY KEY (id), 
    CONSTRAINT fk_items_study_id FOREIGN KEY(study_id) REFERENCES studies (id), 
    CONSTRAINT uq_items_study_id_key UNIQUE (study_id, "key"), 
    CONSTRAINT uq_items_study_id_position UNIQUE (study_id, position)
);
CREATE TABLE outputs (
    id INTEGER NOT NULL, 
    item_id INTEGER NOT NULL, 
    position INTEGER NOT NULL, 
    text JSON NOT NULL, 
    finished BOOLEAN NOT NULL, 
    source JSON NOT NULL, 
    CONSTRAINT pk_outputs PRIMARY KEY (id), 
    CONSTRAINT fk_outputs_item_id FOREIGN KEY(item_id) REFERENCES items (id), 
    CONSTRAINT uq_outputs_item_id_position UNIQUE (item_id, position)
);
CREATE TABLE assignments (
    id TEXT NOT NULL, 
    study_id INTEGER NOT NULL, 
    item_id INTEGER NOT NULL, 
    slot INTEGER NOT NULL, 
    sequence INTEGER NOT NULL, 
    order_seed BIGINT NOT NULL, 
    state TEXT NOT NULL, 
    rater_id INTEGER, 
    claim_token TEXT, 
    leased_until DOUBLE, 
    CONSTRAINT pk_assignments PRIMARY KEY (id), 
    CONSTRAINT fk_assignments_study_id FOREIGN KEY(study_id) REFERENCES studies (id), 
    CONSTRAINT fk_assignments_item_id FOREIGN KEY(item_id) REFERENCES items (id), 
    CONSTRAINT fk_assignments_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id), 
    CONSTRAINT uq_assignments_item_id_slot UNIQUE (item_id, slot), 
    CONSTRAINT uq_assignments_item_id_rater_id UNIQUE (item_id, rater_id), 
    CONSTRAINT ck_assignments_state CHECK (state IN ('open', 'leased', 'done')), 
    CONSTRAINT ck_assignments_holder CHECK ((state = 'open') = (rater_id IS NULL)), 
    CONSTRAINT ck_assignments_token CHECK ((rater_id IS NULL) = (claim_token IS NULL))
);
CREATE INDEX ix_assignments_study_id_state_sequence ON assignments (study_id, state, sequence);
CREATE TABLE leases (
    id INTEGER NOT NULL, 
    assignment_id TEXT NOT NULL, 
    token TEXT NOT NULL, 
    rater_id INTEGER NOT NULL, 
    started_at DOUBLE NOT NULL, 
    CONSTRAINT pk_leases PRIMARY KEY (id), 
    CONSTRAINT fk_leases_assignment_id FOREIGN KEY(assignment_id) REFERENCES assignments (id), 
    CONSTRAINT fk_leases_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id), 
    CONSTRAINT uq_leases_assignment_id_token UNIQUE (assignment_id, token)
);
CREATE TABLE answers (
    id INTEGER NOT NULL, 
    lease_id INTEGER NOT NULL, 
    revision INTEGER NOT NULL, 
    body JSON NOT NULL, 
    answer_schema INTEGER NOT NULL, 
    guideline_version TEXT NOT NULL, 
    order_shown JSON NOT NULL, 
    started_at DOUBLE NOT NULL, 
    submitted_at DOUBLE NOT NULL, 
    seconds DOUBLE NOT NULL, 
    origin TEXT NOT NULL, 
    CONSTRAINT pk_answers PRIMARY KEY (id), 
    CONSTRAINT fk_answers_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id), 
    CONSTRAINT fk_answers_guideline_version FOREIGN KEY(guideline_version) REFERENCES guidelines (version), 
    CONSTRAINT uq_answers_lease_id_revision UNIQUE (lease_id, revision), 
    CONSTRAINT ck_answers_origin CHECK (origin IN ('human', 'simulated'))
);
CREATE TRIGGER leases_refuse_update BEFORE UPDATE ON leases BEGIN SELECT RAISE(ABORT, 'leases are append-only: a correction is a new row'); END;
CREATE TRIGGER leases_refuse_delete BEFORE DELETE ON leases BEGIN SELECT RAISE(ABORT, 'leases are append-only: a correction is a new row'); END;
CREATE TRIGGER answers_refuse_update BEFORE UPDATE ON answers BEGIN SELECT RAISE(ABORT, 'answers are append-only: a correction is a new row'); END;
CREATE TRIGGER answers_refuse_delete BEFORE DELETE ON answers BEGIN SELECT RAISE(ABORT, 'answers are append-only: a correction is a new row'); END;
CREATE TABLE accounts (
    id INTEGER NOT NULL, 
    name TEXT NOT NULL, 
    password_hash TEXT, 
    rater_id INTEGER, 
    created_at DOUBLE NOT NULL, 
    disabled_at DOUBLE, 
    CONSTRAINT pk_accounts PRIMARY KEY (id), 
    CONSTRAINT fk_accounts_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id), 
    CONSTRAINT uq_accounts_name UNIQUE (name), 
    CONSTRAINT uq_accounts_rater_id UNIQUE (rater_id)
);
CREATE TABLE account_roles (
    account_id INTEGER NOT NULL, 
    role TEXT NOT NULL, 
    CONSTRAINT pk_account_roles PRIMARY KEY (account_id, role), 
    CONSTRAINT ck_account_roles_role CHECK (role IN ('admin', 'lead', 'adjudicator', 'rater', 'researcher', 'auditor', 'service')), 
    CONSTRAINT fk_account_roles_account_id FOREIGN KEY(account_id) REFERENCES accounts (id)
);
CREATE TABLE invitations (
    id INTEGER NOT NULL, 
    token_hash TEXT NOT NULL, 
    roles JSON NOT NULL, 
    rater_group TEXT, 
    invited_by TEXT NOT NULL, 
    created_at DOUBLE NOT NULL, 
    expires_at DOUBLE NOT NULL, 
    used_at DOUBLE, 
    account_id INTEGER, 
    CONSTRAINT pk_invitations PRIMARY KEY (id), 
    CONSTRAINT fk_invitations_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT uq_invitations_token_hash UNIQUE (token_hash)
);
CREATE TABLE sessions (
    id INTEGER NOT NULL, 
    token_hash TEXT NOT NULL, 
    account_id INTEGER NOT NULL, 
    created_at DOUBLE NOT NULL, 
    seen_at DOUBLE NOT NULL, 
    ended_at DOUBLE, 
    CONSTRAINT pk_sessions PRIMARY KEY (id), 
    CONSTRAINT fk_sessions_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT uq_sessions_token_hash UNIQUE (token_hash)
);
CREATE TABLE api_tokens (
    id INTEGER NOT NULL, 
    token_hash TEXT NOT NULL, 
    account_id INTEGER NOT NULL, 
    label TEXT NOT NULL, 
    created_at DOUBLE NOT NULL, 
    seen_at DOUBLE, 
    revoked_at DOUBLE, 
    CONSTRAINT pk_api_tokens PRIMARY KEY (id), 
    CONSTRAINT fk_api_tokens_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT uq_api_tokens_token_hash UNIQUE (token_hash)
);
CREATE TABLE throttles (
    "key" TEXT NOT NULL, 
    tokens DOUBLE NOT NULL, 
    updated_at DOUBLE NOT NULL, 
    CONSTRAINT pk_throttles PRIMARY KEY ("key")
);
CREATE TABLE study_raters (
    study_id INTEGER NOT NULL, 
    rater_id INTEGER NOT NULL, 
    CONSTRAINT pk_study_raters PRIMARY KEY (study_id, rater_id), 
    CONSTRAINT fk_study_raters_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id), 
    CONSTRAINT fk_study_raters_study_id FOREIGN KEY(study_id) REFERENCES studies (id)
);
CREATE TABLE rater_profiles (
    rater_id INTEGER NOT NULL, 
    topics JSON NOT NULL, 
    updated_at DOUBLE NOT NULL, 
    CONSTRAINT pk_rater_profiles PRIMARY KEY (rater_id), 
    CONSTRAINT fk_rater_profiles_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id)
);
CREATE TABLE drafts (
    lease_id INTEGER NOT NULL, 
    version INTEGER NOT NULL, 
    body JSON NOT NULL, 
    saved_at DOUBLE NOT NULL, 
    CONSTRAINT pk_drafts PRIMARY KEY (lease_id), 
    CONSTRAINT fk_drafts_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id)
);
CREATE TABLE remarks (
    id INTEGER NOT NULL, 
    lease_id INTEGER NOT NULL, 
    kind TEXT NOT NULL, 
    reason TEXT, 
    note JSON, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_remarks PRIMARY KEY (id), 
    CONSTRAINT ck_remarks_kind CHECK (kind IN ('skip', 'flag')), 
    CONSTRAINT fk_remarks_lease_id FOREIGN KEY(lease_id) REFERENCES leases (id)
);
CREATE TABLE gold (
    item_id INTEGER NOT NULL, 
    expected JSON NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_gold PRIMARY KEY (item_id), 
    CONSTRAINT fk_gold_item_id FOREIGN KEY(item_id) REFERENCES items (id)
);
CREATE TABLE adjudications (
    id INTEGER NOT NULL, 
    item_id INTEGER NOT NULL, 
    revision INTEGER NOT NULL, 
    body JSON NOT NULL, 
    reason JSON NOT NULL, 
    account_id INTEGER NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_adjudications PRIMARY KEY (id), 
    CONSTRAINT fk_adjudications_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT fk_adjudications_item_id FOREIGN KEY(item_id) REFERENCES items (id), 
    CONSTRAINT uq_adjudications_item_id_revision UNIQUE (item_id, revision)
);
CREATE TABLE grades (
    id INTEGER NOT NULL, 
    answer_id INTEGER NOT NULL, 
    account_id INTEGER NOT NULL, 
    score INTEGER NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_grades PRIMARY KEY (id), 
    CONSTRAINT ck_grades_score CHECK (score BETWEEN 1 AND 7), 
    CONSTRAINT fk_grades_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT fk_grades_answer_id FOREIGN KEY(answer_id) REFERENCES answers (id)
);
CREATE TABLE screening_decisions (
    id INTEGER NOT NULL, 
    rater_id INTEGER NOT NULL, 
    passed BOOLEAN NOT NULL, 
    reason JSON NOT NULL, 
    account_id INTEGER, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_screening_decisions PRIMARY KEY (id), 
    CONSTRAINT fk_screening_decisions_account_id FOREIGN KEY(account_id) REFERENCES accounts (id), 
    CONSTRAINT fk_screening_decisions_rater_id FOREIGN KEY(rater_id) REFERENCES raters (id)
);
CREATE TABLE audit (
    sequence INTEGER NOT NULL, 
    at DOUBLE NOT NULL, 
    actor TEXT NOT NULL, 
    role TEXT NOT NULL, 
    action TEXT NOT NULL, 
    object TEXT NOT NULL, 
    details JSON NOT NULL, 
    request_id TEXT, 
    previous_hash TEXT NOT NULL, 
    hash TEXT NOT NULL, 
    CONSTRAINT pk_audit PRIMARY KEY (sequence), 
    CONSTRAINT uq_audit_hash UNIQUE (hash)
);
CREATE INDEX ix_leases_rater_id ON leases (rater_id);
CREATE INDEX ix_sessions_account_id ON sessions (account_id);
CREATE INDEX ix_api_tokens_account_id ON api_tokens (account_id);
CREATE INDEX ix_remarks_lease_id ON remarks (lease_id);
CREATE INDEX ix_grades_answer_id ON grades (answer_id);
CREATE INDEX ix_screening_decisions_rater_id ON screening_decisions (rater_id);
CREATE TRIGGER remarks_refuse_update BEFORE UPDATE ON remarks BEGIN SELECT RAISE(ABORT, 'remarks are append-only: a correction is a new row'); END;
CREATE TRIGGER remarks_refuse_delete BEFORE DELETE ON remarks BEGIN SELECT RAISE(ABORT, 'remarks are append-only: a correction is a new row'); END;
CREATE TRIGGER grades_refuse_update BEFORE UPDATE ON grades BEGIN SELECT RAISE(ABORT, 'grades are append-only: a correction is a new row'); END;
CREATE TRIGGER grades_refuse_delete BEFORE DELETE ON grades BEGIN SELECT RAISE(ABORT, 'grades are append-only: a correction is a new row'); END;
CREATE TRIGGER adjudications_refuse_update BEFORE UPDATE ON adjudications BEGIN SELECT RAISE(ABORT, 'adjudications are append-only: a correction is a new row'); END;
CREATE TRIGGER adjudications_refuse_delete BEFORE DELETE ON adjudications BEGIN SELECT RAISE(ABORT, 'adjudications are append-only: a correction is a new row'); END;
CREATE TRIGGER screening_decisions_refuse_update BEFORE UPDATE ON screening_decisions BEGIN SELECT RAISE(ABORT, 'screening_decisions are append-only: a correction is a new row'); END;
CREATE TRIGGER screening_decisions_refuse_delete BEFORE DELETE ON screening_decisions BEGIN SELECT RAISE(ABORT, 'screening_decisions are append-only: a correction is a new row'); END;
CREATE TRIGGER audit_refuse_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'audit are append-only: a correction is a new row'); END;
CREATE TRIGGER audit_refuse_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'audit are append-only: a correction is a new row'); END;
CREATE TABLE screening_cut_offs (
    id INTEGER NOT NULL, 
    rater_group TEXT NOT NULL, 
    flags DOUBLE, 
    rankings DOUBLE, 
    demonstrations DOUBLE, 
    account_id INTEGER NOT NULL, 
    created_at DOUBLE NOT NULL, 
    CONSTRAINT pk_screening_cut_offs PRIMARY KEY (id), 
    CONSTRAINT ck_screening_cut_offs_flags CHECK (flags BETWEEN 0 AND 1), 
    CONSTRAINT ck_screening_cut_offs_rankings CHECK (rankings BETWEEN 0 AND 1), 
    CONSTRAINT ck_screening_cut_offs_demonstrations CHECK (demonstrations BETWEEN 1 AND 7), 
    CONSTRAINT fk_screening_cut_offs_account_id FOREIGN KEY(account_id) REFERENCES accounts (id)
);
CREATE TRIGGER screening_cut_offs_refuse_update BEFORE UPDATE ON screening_cut_offs BEGIN SELECT RAISE(ABORT, 'screening_cut_offs are append-only: a correction is a new row'); END;
CREATE TRIGGER screening_cut_offs_refuse_delete BEFORE DELETE ON screening_cut_offs BEGIN SELECT RAISE(ABORT, 'screening_cut_offs are append-only: a correction is a new row'); END;
CREATE INDEX ix_throttles_updated_at ON throttles (updated_at);
