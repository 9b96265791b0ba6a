-- What a worker's device does in a second; not known of workers that are older than this or could not measure it.
alter table workers add column flops_per_s double precision, add column bytes_per_s double precision;

-- What the job was reckoned to take when it was asked for; null where that could not be known.
alter table jobs add column plan jsonb;
