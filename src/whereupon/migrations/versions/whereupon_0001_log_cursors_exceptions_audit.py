"""The log, the cursors over it, exceptions, history, workflows and the audit trail."""

from __future__ import annotations

from alembic import op

from whereupon.errors import UnsupportedDatabaseError

revision = "whereupon_0001"
down_revision = None
branch_labels = ("whereupon",)
depends_on = None

# One statement between two empty lines: drivers take them one at a time.
#
# The log of PostgreSQL is cut into ranges of positions, so that pruning drops tables. Workers make them ahead of the
# sequence (whereupon.retention); what they did not make in time goes into the default one, so publishing needs none of
# them. tx_id comes before position, as do their defaults: whoever draws a position has its transaction's id by then.
#
# Transaction ids mean something in one cluster only. Those of the log, and the snapshots of cursors, are shifted by
# 2**48 for each cluster that the database was moved to (whereupon.cluster), so they go on ascending. What is written
# into a cluster that is not known yet is shifted by 2**62: no cursor has passed it, none sees it before the rebase.
_POSTGRESQL = """
CREATE TABLE whereupon_meta (key varchar(50) PRIMARY KEY, value text NOT NULL);

CREATE TABLE whereupon_cluster (
    number smallint PRIMARY KEY,
    system_identifier bigint NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);

INSERT INTO whereupon_cluster (number, system_identifier) SELECT 0, system_identifier FROM pg_control_system();

CREATE FUNCTION whereupon_shift() RETURNS bigint LANGUAGE sql STABLE AS $$
SELECT CASE WHEN c.system_identifier = s.system_identifier THEN c.number::bigint << 48 ELSE 1::bigint << 62 END
FROM whereupon_cluster c CROSS JOIN pg_control_system() s ORDER BY c.number DESC LIMIT 1
$$;

CREATE FUNCTION whereupon_xact_id() RETURNS xid8 LANGUAGE sql VOLATILE AS $$
SELECT CAST(CAST(CAST(CAST(pg_current_xact_id() AS text) AS bigint) + whereupon_shift() AS text) AS xid8)
$$;

CREATE FUNCTION whereupon_snapshot() RETURNS pg_snapshot LANGUAGE plpgsql STABLE AS $$
DECLARE
    shift bigint := whereupon_shift();
    seen pg_snapshot := pg_current_snapshot();
BEGIN
    IF shift = 0 THEN
        RETURN seen;
    ELSIF shift = 1::bigint << 62 THEN
        RAISE EXCEPTION 'this database was restored or replicated into another cluster, whose transaction ids differ'
            USING ERRCODE = '55000', HINT = 'Run `whereupon db rebase`.';
    END IF;
    RETURN CAST(format('%s:%s:%s',
        CAST(CAST(pg_snapshot_xmin(seen) AS text) AS bigint) + shift,
        CAST(CAST(pg_snapshot_xmax(seen) AS text) AS bigint) + shift,
        (SELECT string_agg(CAST(CAST(CAST(x AS text) AS bigint) + shift AS text), ',' ORDER BY x)
            FROM pg_snapshot_xip(seen) AS x)) AS pg_snapshot);
END $$;

CREATE SEQUENCE whereupon_log_position AS bigint CACHE 1;

CREATE TABLE whereupon_log (
    tx_id xid8 NOT NULL DEFAULT whereupon_xact_id(),
    position bigint NOT NULL DEFAULT nextval('whereupon_log_position'),
    event_id uuid NOT NULL,
    type text NOT NULL,
    version integer NOT NULL,
    payload bytea NOT NULL,
    headers text NOT NULL,
    keys text,
    ran jsonb,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (position)
) PARTITION BY RANGE (position);

ALTER SEQUENCE whereupon_log_position OWNED BY whereupon_log.position;

CREATE TABLE whereupon_log_default PARTITION OF whereupon_log DEFAULT;

CREATE TABLE whereupon_log_1 PARTITION OF whereupon_log FOR VALUES FROM (1) TO (1000001);

CREATE TABLE whereupon_log_1000001 PARTITION OF whereupon_log FOR VALUES FROM (1000001) TO (2000001);

CREATE INDEX whereupon_log_tx_id ON whereupon_log (tx_id, position);

CREATE INDEX whereupon_log_event_id ON whereupon_log (event_id);

-- Empty after a crash: what a worker remembers from before it may name transaction ids that are handed out again.
CREATE UNLOGGED TABLE whereupon_epoch (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    id uuid NOT NULL DEFAULT gen_random_uuid()
);

CREATE TABLE whereupon_process (
    id uuid PRIMARY KEY,
    lease_until timestamptz NOT NULL,
    in_flight integer NOT NULL,
    alone boolean NOT NULL DEFAULT false,
    host text NOT NULL,
    pid integer NOT NULL,
    serves text NOT NULL DEFAULT '[]',
    started_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

CREATE TABLE whereupon_subscription (
    name text PRIMARY KEY,
    lanes smallint NOT NULL,
    ordered_by text,
    definition text NOT NULL,
    revision integer NOT NULL DEFAULT 1,
    paused boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE whereupon_definition (
    subscription text NOT NULL,
    definition text NOT NULL,
    revision integer NOT NULL,
    first_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (subscription, definition)
);

CREATE TABLE whereupon_cursor (
    subscription text NOT NULL,
    generation integer NOT NULL DEFAULT 0,
    lane smallint NOT NULL,
    snapshot pg_snapshot NOT NULL,
    target pg_snapshot,
    page bigint NOT NULL DEFAULT 0,
    done bigint[] NOT NULL DEFAULT '{}',
    last bigint,
    rate double precision,
    crashes smallint NOT NULL DEFAULT 0,
    owner uuid,
    token bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (subscription, generation, lane)
) WITH (fillfactor = 25, autovacuum_vacuum_threshold = 50, autovacuum_vacuum_scale_factor = 0);

CREATE TABLE whereupon_exception (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subscription text NOT NULL,
    generation integer NOT NULL DEFAULT 0,
    lane smallint NOT NULL,
    position bigint NOT NULL,
    event_id uuid NOT NULL,
    type text NOT NULL,
    version integer NOT NULL,
    payload bytea NOT NULL,
    headers text NOT NULL,
    keys text,
    key text,
    state varchar(20) NOT NULL,
    attempts integer NOT NULL,
    alone boolean NOT NULL DEFAULT false,
    next_at timestamptz,
    error_type text,
    error_message text,
    traceback text,
    fingerprint text,
    recorded_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (subscription, generation, position)
);

CREATE INDEX whereupon_exception_due ON whereupon_exception (next_at) WHERE next_at IS NOT NULL;

CREATE INDEX whereupon_exception_lane ON whereupon_exception (subscription, generation, lane, state, next_at);

CREATE INDEX whereupon_exception_key ON whereupon_exception (subscription, generation, lane, key, id)
    WHERE key IS NOT NULL;

CREATE INDEX whereupon_exception_event_id ON whereupon_exception (event_id);

CREATE INDEX whereupon_exception_dead ON whereupon_exception (id) WHERE state = 'dead';

CREATE INDEX whereupon_exception_cause ON whereupon_exception (subscription, fingerprint, id) WHERE state = 'dead';

CREATE INDEX whereupon_exception_open ON whereupon_exception (subscription, recorded_at)
    WHERE state IN ('running', 'retrying', 'waiting', 'parked');

CREATE TABLE whereupon_history (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    subscription text NOT NULL,
    generation integer NOT NULL DEFAULT 0,
    worker uuid NOT NULL,
    first_position bigint NOT NULL,
    last_position bigint NOT NULL,
    entries text NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX whereupon_history_positions ON whereupon_history (subscription, first_position, last_position);

CREATE INDEX whereupon_history_recorded_at ON whereupon_history (recorded_at);

CREATE TABLE whereupon_action (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    author text NOT NULL,
    action varchar(20) NOT NULL,
    subscription text NOT NULL,
    generation integer,
    position bigint,
    event_id uuid,
    reason text NOT NULL,
    details jsonb NOT NULL
);

CREATE INDEX whereupon_action_subscription ON whereupon_action (subscription, id);

CREATE INDEX whereupon_action_event_id ON whereupon_action (event_id) WHERE event_id IS NOT NULL;

CREATE TABLE whereupon_workflow (
    id uuid PRIMARY KEY,
    name text NOT NULL,
    state varchar(20) NOT NULL DEFAULT 'open',
    process uuid NOT NULL,
    type text NOT NULL,
    version integer NOT NULL,
    payload bytea,
    headers text NOT NULL,
    reason text,
    outcome_id uuid,
    opened_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at timestamptz
);

CREATE INDEX whereupon_workflow_open ON whereupon_workflow (process) WHERE state = 'open';

CREATE INDEX whereupon_workflow_closed_at ON whereupon_workflow (closed_at) WHERE closed_at IS NOT NULL;

CREATE TABLE whereupon_audit (
    id uuid PRIMARY KEY,
    event_id uuid NOT NULL,
    event_type text NOT NULL,
    action text NOT NULL,
    category text,
    outcome text NOT NULL,
    user_id uuid,
    resource_type text,
    resource_id text,
    context json NOT NULL,
    actor text,
    ip_address text,
    user_agent text,
    correlation_id uuid,
    occurred_at timestamptz NOT NULL,
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE INDEX whereupon_audit_user_id ON whereupon_audit (user_id, occurred_at);

CREATE INDEX whereupon_audit_action ON whereupon_audit (action, occurred_at);

CREATE UNIQUE INDEX whereupon_audit_event_id ON whereupon_audit (event_id);

CREATE FUNCTION whereupon_audit_refuses() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'whereupon_audit is append-only: % refused', TG_OP;
END $$;

CREATE TRIGGER whereupon_audit_no_change BEFORE UPDATE OR DELETE ON whereupon_audit
    FOR EACH ROW EXECUTE FUNCTION whereupon_audit_refuses();

CREATE TRIGGER whereupon_audit_no_truncate BEFORE TRUNCATE ON whereupon_audit
    FOR EACH STATEMENT EXECUTE FUNCTION whereupon_audit_refuses();

INSERT INTO whereupon_meta (key, value) VALUES ('revision', '1'), ('database_id', gen_random_uuid()::text);
"""

_SQLITE = """
CREATE TABLE whereupon_meta (key VARCHAR(50) PRIMARY KEY, value TEXT NOT NULL);

CREATE TABLE whereupon_log (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id CHAR(32) NOT NULL,
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    payload BLOB NOT NULL,
    headers TEXT NOT NULL,
    keys TEXT,
    ran JSON,
    recorded_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now'))
);

CREATE INDEX whereupon_log_event_id ON whereupon_log (event_id);

CREATE TABLE whereupon_process (
    id CHAR(32) PRIMARY KEY,
    lease_until DATETIME NOT NULL,
    in_flight INTEGER NOT NULL,
    alone BOOLEAN NOT NULL DEFAULT 0,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    serves TEXT NOT NULL DEFAULT '[]',
    started_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now'))
);

CREATE TABLE whereupon_subscription (
    name TEXT PRIMARY KEY,
    lanes SMALLINT NOT NULL,
    ordered_by TEXT,
    definition TEXT NOT NULL,
    revision INTEGER NOT NULL DEFAULT 1,
    paused BOOLEAN NOT NULL DEFAULT 0,
    created_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now'))
);

CREATE TABLE whereupon_definition (
    subscription TEXT NOT NULL,
    definition TEXT NOT NULL,
    revision INTEGER NOT NULL,
    first_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    PRIMARY KEY (subscription, definition)
);

CREATE TABLE whereupon_cursor (
    subscription TEXT NOT NULL,
    generation INTEGER NOT NULL DEFAULT 0,
    lane SMALLINT NOT NULL,
    page INTEGER NOT NULL,
    done TEXT NOT NULL DEFAULT '[]',
    last INTEGER,
    rate REAL,
    crashes SMALLINT NOT NULL DEFAULT 0,
    owner CHAR(32),
    token INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (subscription, generation, lane)
);

CREATE TABLE whereupon_exception (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription TEXT NOT NULL,
    generation INTEGER NOT NULL DEFAULT 0,
    lane SMALLINT NOT NULL,
    position INTEGER NOT NULL,
    event_id CHAR(32) NOT NULL,
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    payload BLOB NOT NULL,
    headers TEXT NOT NULL,
    keys TEXT,
    key TEXT,
    state VARCHAR(20) NOT NULL,
    attempts INTEGER NOT NULL,
    alone BOOLEAN NOT NULL DEFAULT 0,
    next_at DATETIME,
    error_type TEXT,
    error_message TEXT,
    traceback TEXT,
    fingerprint TEXT,
    recorded_at DATETIME NOT NULL,
    updated_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    UNIQUE (subscription, generation, position)
);

CREATE INDEX whereupon_exception_due ON whereupon_exception (next_at) WHERE next_at IS NOT NULL;

CREATE INDEX whereupon_exception_lane ON whereupon_exception (subscription, generation, lane, state, next_at);

CREATE INDEX whereupon_exception_key ON whereupon_exception (subscription, generation, lane, key, id)
    WHERE key IS NOT NULL;

CREATE INDEX whereupon_exception_event_id ON whereupon_exception (event_id);

CREATE INDEX whereupon_exception_dead ON whereupon_exception (id) WHERE state = 'dead';

-- With the state in it, too: SQLite would look into each row for it, though the index has dead ones alone.
CREATE INDEX whereupon_exception_cause ON whereupon_exception (subscription, fingerprint, id, state)
    WHERE state = 'dead';

CREATE INDEX whereupon_exception_open ON whereupon_exception (subscription, recorded_at)
    WHERE state IN ('running', 'retrying', 'waiting', 'parked');

CREATE TABLE whereupon_history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    subscription TEXT NOT NULL,
    generation INTEGER NOT NULL DEFAULT 0,
    worker CHAR(32) NOT NULL,
    first_position INTEGER NOT NULL,
    last_position INTEGER NOT NULL,
    entries TEXT NOT NULL,
    recorded_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now'))
);

CREATE INDEX whereupon_history_positions ON whereupon_history (subscription, first_position, last_position);

CREATE INDEX whereupon_history_recorded_at ON whereupon_history (recorded_at);

CREATE TABLE whereupon_action (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    author TEXT NOT NULL,
    action VARCHAR(20) NOT NULL,
    subscription TEXT NOT NULL,
    generation INTEGER,
    position INTEGER,
    event_id CHAR(32),
    reason TEXT NOT NULL,
    details JSON NOT NULL
);

CREATE INDEX whereupon_action_subscription ON whereupon_action (subscription, id);

CREATE INDEX whereupon_action_event_id ON whereupon_action (event_id) WHERE event_id IS NOT NULL;

CREATE TABLE whereupon_workflow (
    id CHAR(32) PRIMARY KEY,
    name TEXT NOT NULL,
    state VARCHAR(20) NOT NULL DEFAULT 'open',
    process CHAR(32) NOT NULL,
    type TEXT NOT NULL,
    version INTEGER NOT NULL,
    payload BLOB,
    headers TEXT NOT NULL,
    reason TEXT,
    outcome_id CHAR(32),
    opened_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')),
    closed_at DATETIME
);

CREATE INDEX whereupon_workflow_open ON whereupon_workflow (process) WHERE state = 'open';

CREATE INDEX whereupon_workflow_closed_at ON whereupon_workflow (closed_at) WHERE closed_at IS NOT NULL;

CREATE TABLE whereupon_audit (
    id CHAR(32) PRIMARY KEY,
    event_id CHAR(32) NOT NULL,
    event_type TEXT NOT NULL,
    action TEXT NOT NULL,
    category TEXT,
    outcome TEXT NOT NULL,
    user_id CHAR(32),
    resource_type TEXT,
    resource_id TEXT,
    context JSON NOT NULL,
    actor TEXT,
    ip_address TEXT,
    user_agent TEXT,
    correlation_id CHAR(32),
    occurred_at DATETIME NOT NULL,
    recorded_at DATETIME NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now'))
) WITHOUT ROWID;

CREATE INDEX whereupon_audit_user_id ON whereupon_audit (user_id, occurred_at);

CREATE INDEX whereupon_audit_action ON whereupon_audit (action, occurred_at);

CREATE UNIQUE INDEX whereupon_audit_event_id ON whereupon_audit (event_id);

CREATE TRIGGER whereupon_audit_no_update BEFORE UPDATE ON whereupon_audit BEGIN
    SELECT RAISE(ABORT, 'whereupon_audit is append-only: UPDATE refused'); END;

CREATE TRIGGER whereupon_audit_no_delete BEFORE DELETE ON whereupon_audit BEGIN
    SELECT RAISE(ABORT, 'whereupon_audit is append-only: DELETE refused'); END;

CREATE TRIGGER whereupon_audit_no_replace BEFORE INSERT ON whereupon_audit
    WHEN EXISTS (SELECT 1 FROM whereupon_audit WHERE id = NEW.id OR event_id = NEW.event_id) BEGIN
    SELECT RAISE(ABORT, 'whereupon_audit is append-only, and this event is in it: REPLACE refused'); END;

INSERT INTO whereupon_meta (key, value) VALUES ('revision', '1'), ('database_id', lower(hex(randomblob(16))));
"""


def upgrade() -> None:
    dialect = op.get_context().dialect.name
    if dialect == "postgresql":
        script = _POSTGRESQL
    elif dialect == "sqlite":
        script = _SQLITE
    else:
        raise UnsupportedDatabaseError(f"whereupon has tables for PostgreSQL and SQLite, not for {dialect}")
    for statement in script.strip().split("\n\n"):
        op.execute(statement)


def downgrade() -> None:
    for table in (
        "audit",
        "workflow",
        "action",
        "history",
        "exception",
        "cursor",
        "definition",
        "subscription",
        "process",
        "log",
        "meta",
    ):
        op.drop_table(f"whereupon_{table}")
    if op.get_context().dialect.name == "postgresql":
        op.drop_table("whereupon_cluster")
        op.drop_table("whereupon_epoch")
        for function in ("audit_refuses", "snapshot", "xact_id", "shift"):
            op.execute(f"DROP FUNCTION whereupon_{function}()")
