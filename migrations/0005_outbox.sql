-- Who wants to hear of jobs.
create table webhook_endpoints (
  id uuid primary key,
  tenant_id integer not null references tenants,
  url text not null,
  -- What it wants to hear, such as 'job.succeeded'; empty: everything.
  events text[] not null default '{}',
  description text,
  format text not null default 'standard' check (format in ('standard', 'cloudevents')),
  -- What messages are signed with, sealed by a key that is not in the database.
  secret bytea not null,
  -- The one before, with which messages are signed as well for a time.
  old_secret bytea,
  old_secret_until timestamptz,
  created_at timestamptz not null default now()
);
create index webhook_endpoints_by_tenant on webhook_endpoints (tenant_id, id desc);

-- Receivers that the service was started with, such as 'mlflow'. Messages are written for those that were drained
-- lately: one that is no longer configured costs nothing after a while.
create table sinks (
  name text primary key,
  seen_at timestamptz not null default now()
);

-- Messages for others, written in the transaction of what they tell. At each try they are the same, id and body.
create table outbox (
  id uuid primary key,
  tenant_id integer not null references tenants,
  sink text not null,
  endpoint_id uuid references webhook_endpoints on delete cascade,
  -- No reference: a message outlives its job.
  job_id uuid,
  kind text not null,
  body text not null,
  created_at timestamptz not null default now(),
  -- Tries that have begun.
  attempts integer not null default 0,
  -- Not before this time.
  due_at timestamptz not null default now(),
  -- Somebody tries; nobody else begins before this time.
  claimed_until timestamptz,
  delivered_at timestamptz,
  given_up_at timestamptz,
  check ((sink = 'webhook') = (endpoint_id is not null))
);
create index outbox_due on outbox (due_at) where delivered_at is null and given_up_at is null;
create index outbox_by_endpoint on outbox (endpoint_id, id desc);

-- Every try and what came of it.
create table deliveries (
  message_id uuid not null references outbox on delete cascade,
  attempt integer not null,
  at timestamptz not null default clock_timestamp(),
  -- The HTTP status, when there was an answer.
  status smallint,
  error text,
  duration_ms bigint not null,
  primary key (message_id, attempt)
);

-- What a job is called where it is told of, such as the run of MLflow: made once, found again.
create table external_runs (
  sink text not null,
  job_id uuid not null,
  run_id text not null,
  primary key (sink, job_id)
);
