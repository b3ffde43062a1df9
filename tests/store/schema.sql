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
    created_at DOUBLE NOT NULL, 
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
