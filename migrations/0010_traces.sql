-- The request that asked for a job, so that the job's trace can join the caller's: its `traceparent` (W3C Trace Context), and when it
-- came. Null where nobody traced it, and of jobs that are older than this.
alter table jobs add column traceparent text, add column asked_at timestamptz;
