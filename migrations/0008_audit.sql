-- Who changed what, and when. No bodies: they may hold secrets.
create table audit (
  id uuid primary key,
  tenant_id integer not null references tenants,
  at timestamptz not null default clock_timestamp(),
  -- Of the key; null: a program on this machine, without one.
  key_id text,
  -- The route: method and template.
  action text not null,
  -- The path of what it was done to, or of what was made.
  target text not null,
  request_id text not null
);
create index audit_by_tenant on audit (tenant_id, id desc);

-- Jobs that a tenant may have waiting at once; null: as many as there is room for.
alter table tenants add column max_queued integer default 50000 check (max_queued >= 0);
