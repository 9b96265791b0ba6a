-- Jobs asked for together: one spec and axes along which it varies.
create table sweeps (
  id uuid primary key,
  tenant_id integer not null references tenants,
  name text,
  spec jsonb not null,
  -- Its jobs that may run at once; null: as many as there are devices.
  max_parallel integer check (max_parallel > 0),
  -- The base model's scores, from the first job that was done.
  base jsonb,
  created_at timestamptz not null default now()
);
create index sweeps_by_tenant on sweeps (tenant_id, id desc);

create table sweep_rows (
  sweep_id uuid not null references sweeps on delete cascade,
  position integer not null,
  tenant_id integer not null references tenants,
  -- Null: the job was deleted since.
  job_id uuid unique references jobs on delete set null,
  -- What the job came to, kept so that nobody reads its report again.
  outcome jsonb,
  primary key (sweep_id, position)
);
