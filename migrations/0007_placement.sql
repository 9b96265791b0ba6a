-- When a job may run, and on what: from its spec, so that a claim need not look into that.
alter table jobs
  -- Since when it waits, when it waits.
  add column queued_at timestamptz not null default now(),
  -- Since when its attempt runs, when one does.
  add column running_since timestamptz,
  -- Of the attempts that have ended.
  add column run_seconds double precision not null default 0,
  add column max_queue_s integer check (max_queue_s > 0),
  add column max_run_s integer check (max_run_s > 0),
  add column needs_labels jsonb not null default '{}',
  add column needs_memory_bytes bigint;
create index jobs_expiring on jobs (queued_at) where state = 'queued' and max_queue_s is not null;

-- What a worker was started with; memory not known of workers that are older than this.
alter table workers add column labels jsonb not null default '{}', add column job_memory_bytes bigint;
