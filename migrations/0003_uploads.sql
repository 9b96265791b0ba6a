-- Files that callers bring: open until every part is there and their digest is right.
create table uploads (
  id uuid primary key,
  tenant_id integer not null references tenants,
  -- As the caller calls it; only its ending counts.
  name text not null,
  -- Key in the store; made here, never of the caller's words.
  location text not null,
  size_bytes bigint not null check (size_bytes > 0),
  sha256 text not null check (length(sha256) = 64),
  part_size_bytes bigint not null check (part_size_bytes > 0),
  created_at timestamptz not null default now(),
  completed_at timestamptz
);
create index uploads_by_tenant on uploads (tenant_id, id desc);

-- The parts that are written in full, from 1.
create table upload_parts (
  upload_id uuid not null references uploads on delete cascade,
  number integer not null check (number > 0),
  sha256 text not null check (length(sha256) = 64),
  primary key (upload_id, number)
);
