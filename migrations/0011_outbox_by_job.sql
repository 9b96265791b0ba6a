-- What others were told of a job is asked by the job. Not `concurrently`: messages are kept for a month only, and of two programs that
-- migrate at once the one that waits would hold the other's index up.
create index outbox_by_job on outbox (job_id, id desc) where job_id is not null;
