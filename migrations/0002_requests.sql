-- A job made from a failed or cancelled one; it goes on with that one's records.
alter table jobs add column retry_of uuid;

-- What is left of a deleted job: its id tells that it is gone, not that it never was.
create table tombstones (
  job_id uuid primary key,
  tenant_id integer not null references tenants,
  deleted_at timestamptz not null default now()
);

-- Requests to create a job that may come again (`Idempotency-Key`). Written in
-- the transaction of the job, so that either both are there or neither.
create table idempotency_keys (
  tenant_id integer not null references tenants,
  key text not null,
  -- sha256 of what was asked.
  fingerprint bytea not null check (length(fingerprint) = 32),
  -- The job may be deleted meanwhile.
  job_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (tenant_id, key)
);

-- What a worker's machine has; not known of workers that are older than this.
alter table workers add column core_count integer, add column memory_bytes bigint;
