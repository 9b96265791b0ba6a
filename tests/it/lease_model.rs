//! The protocol of leases as a small machine, every one of whose states is looked at.
//!
//! Each [`Step`] is a transaction of `src/service/db/leases.rs` or `jobs.rs`, or something that befalls workers between
//! two of them. A transaction is one step, because it locks its rows: but the claim, which reads the limit before it
//! locks the job and so has two. Time is "this lease has run out", which may be true whenever it likes.
//!
//! Two kinds of law are checked. In every state that can be reached: those of [`State::broken_law`]. And from each of
//! them: that all jobs can still end. What is ghostly in a state is known to the checker only, not to the protocol.
//!
//! Then the same with a piece of the protocol left out ([`Flaw`]): each must be caught.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::rc::Rc;

use secateur::job::report::FailureKind;
use secateur::job::state::{Change, JobState, Wish};

/// Attempts that may fail, and those that may lose their worker: `Limits`.
const ATTEMPTS: u8 = 2;
const CRASHES: u8 = 2;

/// A row of `jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Job {
    state: JobState,
    wish: Option<Wish>,
    epoch: u8,
    attempt: u8,
    crashes: u8,
    /// Ghost: finishes that were accepted.
    finished: u8,
}

/// A row of `leases`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Row {
    epoch: u8,
    worker: usize,
    /// `expires_at < now()`.
    expired: bool,
}

/// What a worker's process believes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Hand {
    Idle,
    /// In the transaction of a claim: it has read the head of the queue.
    Chose(usize),
    Holds {
        job: usize,
        epoch: u8,
        /// Ghost: the job's lease is the one that this claim made.
        mine: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    jobs: Vec<Job>,
    leases: Vec<Option<Row>>,
    workers: Vec<Hand>,
    /// Ghost: drains, lost answers and wishes of the user that may still come; without a bound there is no end.
    left: [u8; 3],
    /// Ghost: a write was accepted from an attempt whose lease it was not.
    trespass: bool,
    /// Ghost: a job that had ended, or was to be cancelled, came back.
    revived: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Which job is the head hangs on priorities, ages, waits and labels: any of those that wait.
    ClaimRead(usize, usize),
    ClaimWrite(usize),
    Renew(usize),
    Record(usize),
    Finish(usize),
    Fail(usize),
    Release(usize),
    /// The same three, but the answer is lost on its way: the worker believes that it still holds the job, and
    /// tries again.
    Unheard(End, usize),
    /// The process is gone; its lease stays.
    Die(usize),
    RunOut(usize),
    Reap(usize),
    /// The next process in the dead worker's seat takes its leases away: `Dead::Worker`.
    ReapDead(usize),
    Cancel(usize),
    Pause(usize),
    Resume(usize),
}

/// How an attempt ends its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Finish,
    Fail,
    Release,
}

/// A piece of the protocol that may be left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    /// `delete from leases where job_id = $1`, whatever the epoch.
    EndWithoutEpoch,
    RenewWithoutEpoch,
    /// No `pg_advisory_xact_lock` before the limit is read.
    ClaimWithoutLock,
    /// The claim does not look at the job's state again once it has locked the row.
    ClaimWithoutLook,
    ClaimWithoutBump,
    ReapWithoutBump,
    /// The fence is `jobs.epoch` alone: a lease that is gone does not matter.
    FenceByJob,
    ReapForgetsWish,
    ReapKeepsLease,
    NoReaper,
}

/// What is checked: so many jobs and workers, one tenant that may have `limit` leases.
struct Model {
    jobs: usize,
    workers: usize,
    limit: usize,
    /// Wishes of the user that may come; each makes the machine several times larger.
    wishes: u8,
    flaws: &'static [Flaw],
}

impl Model {
    fn has(&self, flaw: Flaw) -> bool {
        self.flaws.contains(&flaw)
    }

    fn start(&self) -> State {
        let job = Job { state: JobState::Queued, wish: None, epoch: 0, attempt: 0, crashes: 0, finished: 0 };
        State {
            jobs: vec![job; self.jobs],
            leases: vec![None; self.jobs],
            workers: vec![Hand::Idle; self.workers],
            left: [1, 1, self.wishes],
            trespass: false,
            revived: false,
        }
    }

    fn steps(&self) -> Vec<Step> {
        let of_worker = |w| {
            let unheard = [End::Finish, End::Fail, End::Release].map(|end| Step::Unheard(end, w));
            let mut all = vec![Step::ClaimWrite(w), Step::Renew(w), Step::Record(w)];
            all.extend((0..self.jobs).map(|j| Step::ClaimRead(w, j)));
            all.extend([Step::Finish(w), Step::Fail(w), Step::Release(w), Step::Die(w), Step::ReapDead(w)]);
            all.extend(unheard);
            all
        };
        let of_job = |j| [Step::RunOut(j), Step::Reap(j), Step::Cancel(j), Step::Pause(j), Step::Resume(j)];
        (0..self.workers).flat_map(of_worker).chain((0..self.jobs).flat_map(of_job)).collect()
    }

    /// The state after `step`, where it can happen and changes something.
    fn after(&self, before: &State, step: Step) -> Option<State> {
        let mut s = before.clone();
        match step {
            Step::ClaimRead(w, j) => self.claim_read(&mut s, w, j)?,
            Step::ClaimWrite(w) => self.claim_write(&mut s, w)?,
            Step::Renew(w) => self.renew(&mut s, w)?,
            Step::Record(w) => record(&mut s, w)?,
            Step::Finish(w) => self.end(&mut s, w, End::Finish)?,
            Step::Fail(w) => self.end(&mut s, w, End::Fail)?,
            Step::Release(w) => self.end(&mut s, w, End::Release)?,
            Step::Unheard(end, w) => {
                s.left[1] = s.left[1].checked_sub(1)?;
                let belief = s.workers[w];
                self.end(&mut s, w, end)?;
                s.workers[w] = match belief {
                    Hand::Holds { job, epoch, .. } => Hand::Holds { job, epoch, mine: false },
                    idle @ (Hand::Idle | Hand::Chose(_)) => idle,
                };
            }
            Step::Die(w) => {
                matches!(s.workers[w], Hand::Holds { .. }).then_some(())?;
                s.workers[w] = Hand::Idle;
            }
            Step::RunOut(j) => s.leases[j].as_mut()?.expired = true,
            Step::Reap(j) => {
                s.leases[j].filter(|row| row.expired)?;
                self.reap(&mut s, j)?;
            }
            Step::ReapDead(w) => {
                // Whoever sits here now holds nothing: so the lease is of the one before.
                (s.workers[w] == Hand::Idle).then_some(())?;
                let j = s.leases.iter().position(|row| row.is_some_and(|row| row.worker == w))?;
                self.reap(&mut s, j)?;
            }
            Step::Cancel(j) => wish(&mut s, j, Wish::Cancel)?,
            Step::Pause(j) => wish(&mut s, j, Wish::Pause)?,
            Step::Resume(j) => {
                s.jobs[j].state = s.jobs[j].state.after(Change::Resume).ok()?;
                s.jobs[j].wish = None;
            }
        }
        s.revived |= before.jobs.iter().zip(&s.jobs).any(|(old, new)| {
            let cancelled =
                old.wish == Some(Wish::Cancel) && matches!(new.state, JobState::Queued | JobState::Paused);
            old.state.is_terminal() && old.state != new.state || cancelled
        });
        (s != *before).then_some(s)
    }

    /// `claim`, up to `select h.id …`: `select pg_advisory_xact_lock`, then the count of leases and a job that waits.
    fn claim_read(&self, s: &mut State, w: usize, head: usize) -> Option<()> {
        (s.workers[w] == Hand::Idle).then_some(())?;
        // The lock is held until the transaction of another claim ends.
        let locked = s.workers.iter().any(|hand| matches!(hand, Hand::Chose(_)));
        (self.has(Flaw::ClaimWithoutLock) || !locked).then_some(())?;
        // `where t.max_running is null or coalesce(l.n, 0) < t.max_running`
        (s.leases.iter().flatten().count() < self.limit).then_some(())?;
        // `where … j.state = 'queued' … limit 1`
        (s.jobs[head].state == JobState::Queued).then_some(())?;
        s.workers[w] = Hand::Chose(head);
        Some(())
    }

    /// `claim`, the rest: `lock(&mut tx, tenant, id)`, `if job.state != Queued`, `epoch += 1`, `insert into leases`.
    fn claim_write(&self, s: &mut State, w: usize) -> Option<()> {
        let Hand::Chose(j) = s.workers[w] else { return None };
        s.workers[w] = Hand::Idle;
        let job = &mut s.jobs[j];
        match job.state.after(Change::Claim) {
            Ok(running) => job.state = running,
            Err(_) if self.has(Flaw::ClaimWithoutLook) && s.leases[j].is_none() => {
                job.state = JobState::Running;
            }
            // `return Ok(None)`: cancelled, paused or claimed between the two statements.
            Err(_) => return Some(()),
        }
        job.attempt += 1;
        job.epoch += u8::from(!self.has(Flaw::ClaimWithoutBump));
        job.wish = None;
        s.leases[j] = Some(Row { epoch: job.epoch, worker: w, expired: false });
        s.workers[w] = Hand::Holds { job: j, epoch: job.epoch, mine: true };
        Some(())
    }

    /// `update leases … where l.job_id = $2 and l.epoch = $3 … returning j.wish`; no row: lost.
    fn renew(&self, s: &mut State, w: usize) -> Option<()> {
        let Hand::Holds { job, epoch, mine } = s.workers[w] else { return None };
        let found = |row: &&mut Row| row.epoch == epoch || self.has(Flaw::RenewWithoutEpoch);
        match s.leases[job].as_mut().filter(found) {
            Some(row) => {
                row.expired = false;
                s.trespass |= !mine;
            }
            None => s.workers[w] = Hand::Idle,
        }
        Some(())
    }

    /// `end`, and what `finish`, `fail` and `release` do after it.
    fn end(&self, s: &mut State, w: usize, end: End) -> Option<()> {
        let Hand::Holds { job: j, epoch, mine } = s.workers[w] else { return None };
        s.workers[w] = Hand::Idle;
        // `delete from leases where … job_id = $2 and epoch = $3`; `if gone.rows_affected() == 0`: lost.
        let row = s.leases[j].filter(|row| row.epoch == epoch || self.has(Flaw::EndWithoutEpoch));
        if row.is_none() && !self.has(Flaw::FenceByJob) {
            return Some(());
        }
        // `job.filter(|j| j.epoch == lease.epoch).ok_or(LeaseLost)`
        let job = &mut s.jobs[j];
        if job.epoch != epoch && !self.has(Flaw::EndWithoutEpoch) {
            return Some(());
        }
        let change = match end {
            End::Finish => Change::Finish,
            // A failure that may pass; `Some(wish) if retryable` is granted.
            End::Fail => match job.wish {
                Some(_) => Change::Stopped { wish: job.wish },
                None => {
                    let retries_left = job.attempt - job.crashes < ATTEMPTS;
                    Change::Fail { kind: FailureKind::Crash, retries_left }
                }
            },
            End::Release => {
                // Nobody stops but by wish, or when its worker leaves.
                if job.wish.is_none() {
                    s.left[0] = s.left[0].checked_sub(1)?;
                }
                Change::Stopped { wish: job.wish }
            }
        };
        // `job.state.after(…)?`: what is refused is rolled back.
        let Ok(state) = job.state.after(change) else { return Some(()) };
        s.trespass |= !mine;
        job.state = state;
        job.attempt -= u8::from(end == End::Release);
        job.finished += u8::from(end == End::Finish);
        job.wish = None;
        s.drop_lease(j);
        Some(())
    }

    /// `reap_one`: the lease is deleted, the job's `epoch` and `crashes` go up, and its wish is granted.
    fn reap(&self, s: &mut State, j: usize) -> Option<()> {
        (!self.has(Flaw::NoReaper)).then_some(())?;
        let row = s.leases[j]?;
        if !self.has(Flaw::ReapKeepsLease) {
            s.drop_lease(j);
        }
        let job = &mut s.jobs[j];
        if job.epoch != row.epoch {
            return Some(());
        }
        job.epoch += u8::from(!self.has(Flaw::ReapWithoutBump));
        job.crashes += 1;
        let wish = job.wish.filter(|_| !self.has(Flaw::ReapForgetsWish));
        job.state =
            job.state.after(Change::LeaseExpired { wish, crashes_left: job.crashes < CRASHES }).ok()?;
        job.wish = None;
        Some(())
    }

    /// Looks at every state that can be reached.
    ///
    /// # Errors
    /// The law that is broken and the steps that lead there.
    fn check(&self) -> Result<usize, String> {
        let steps = self.steps();
        let start = Rc::new(self.start());
        let mut states = vec![start.clone()];
        let mut known: HashMap<Rc<State>, usize> = [(start, 0)].into();
        let mut came: Vec<Option<(usize, Step)>> = vec![None];
        let mut back: Vec<Vec<usize>> = vec![Vec::new()];
        let mut at = 0;
        while at < states.len() {
            for &step in &steps {
                let Some(next) = self.after(&states[at], step) else { continue };
                let fresh = states.len();
                match known.entry(Rc::new(next)) {
                    Entry::Occupied(seen) => back[*seen.get()].push(at),
                    Entry::Vacant(place) => {
                        states.push(place.key().clone());
                        place.insert(fresh);
                        came.push(Some((at, step)));
                        back.push(vec![at]);
                        if let Some(law) = states[fresh].broken_law(self.limit) {
                            return Err(format!("{law}: {:?}", path(&came, fresh)));
                        }
                    }
                }
            }
            at += 1;
        }
        // Backwards from where all have ended.
        let mut ends: Vec<bool> =
            states.iter().map(|s| s.jobs.iter().all(|j| j.state.is_terminal())).collect();
        let mut open: Vec<usize> = (0..states.len()).filter(|&s| ends[s]).collect();
        while let Some(state) = open.pop() {
            for &before in &back[state] {
                if !std::mem::replace(&mut ends[before], true) {
                    open.push(before);
                }
            }
        }
        match ends.iter().position(|can| !can) {
            Some(stuck) => Err(format!("a job never ends: {:?}", path(&came, stuck))),
            None => Ok(states.len()),
        }
    }
}

/// `select from leases where … epoch = $3 for update`; no row: lost.
fn record(s: &mut State, w: usize) -> Option<()> {
    let Hand::Holds { job, epoch, mine } = s.workers[w] else { return None };
    match s.leases[job].filter(|row| row.epoch == epoch) {
        Some(_) => s.trespass |= !mine,
        None => s.workers[w] = Hand::Idle,
    }
    Some(())
}

/// `job_cancel` and `job_pause`.
fn wish(s: &mut State, j: usize, wish: Wish) -> Option<()> {
    s.left[2] = s.left[2].checked_sub(1)?;
    let job = &mut s.jobs[j];
    let change = match wish {
        Wish::Cancel => Change::RequestCancel,
        Wish::Pause => Change::RequestPause,
    };
    // `job.wish == Some(wish) || job.wish == Some(Wish::Cancel)`: nothing to add.
    (job.wish != Some(wish) && job.wish != Some(Wish::Cancel)).then_some(())?;
    let next = job.state.after(change).ok()?;
    job.wish = (next == JobState::Running).then_some(wish);
    job.state = next;
    Some(())
}

impl State {
    /// `delete from leases where job_id = $1`
    fn drop_lease(&mut self, j: usize) {
        self.leases[j] = None;
        for hand in &mut self.workers {
            if let Hand::Holds { job, mine, .. } = hand {
                *mine &= *job != j;
            }
        }
    }

    fn broken_law(&self, limit: usize) -> Option<&'static str> {
        let running =
            |(job, lease): (&Job, &Option<Row>)| (job.state == JobState::Running) != lease.is_some();
        let laws = [
            (self.trespass, "a write was accepted from an attempt that had lost its lease"),
            (self.jobs.iter().any(|job| job.finished > 1), "a job was finished twice"),
            (self.leases.iter().flatten().count() > limit, "more run than the tenant may have"),
            (self.jobs.iter().zip(&self.leases).any(running), "what runs has a lease, and nothing else has"),
            (self.revived, "a job that had ended or was to be cancelled came back"),
        ];
        laws.into_iter().find_map(|(broken, law)| broken.then_some(law))
    }
}

fn path(came: &[Option<(usize, Step)>], mut at: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    while let Some((before, step)) = came[at] {
        steps.push(step);
        at = before;
    }
    steps.reverse();
    steps
}

/// Two jobs and two workers of a tenant that may have one job running.
fn check(flaws: &'static [Flaw]) -> Result<usize, String> {
    Model { jobs: 2, workers: 2, limit: 1, wishes: 1, flaws }.check()
}

#[test]
fn in_every_state_the_laws_of_leases_hold_and_all_jobs_can_still_end() {
    for (jobs, workers, limit, wishes) in [(2, 2, 1, 1), (2, 2, 2, 1), (1, 3, 1, 2)] {
        let states = Model { jobs, workers, limit, wishes, flaws: &[] }.check().unwrap();
        assert!(states > 1000, "only {states} states: what is checked has become too small");
        println!("{jobs} jobs, {workers} workers, at most {limit} at once: {states} states");
    }
}

#[test]
fn each_piece_of_the_protocol_that_is_left_out_is_missed() {
    let (trespass, limit) = ("had lost its lease", "more run than");
    let (revived, stuck, orphan) = ("came back", "never ends", "and nothing else has");
    for (flaws, law) in [
        (&[Flaw::EndWithoutEpoch][..], trespass),
        (&[Flaw::RenewWithoutEpoch], trespass),
        (&[Flaw::ClaimWithoutBump], trespass),
        (&[Flaw::ClaimWithoutLock], limit),
        (&[Flaw::ClaimWithoutLook], revived),
        (&[Flaw::ReapForgetsWish], revived),
        (&[Flaw::ReapKeepsLease], orphan),
        (&[Flaw::NoReaper], stuck),
    ] {
        let caught = check(flaws).expect_err("it must be caught");
        assert!(caught.contains(law), "{flaws:?}: {caught}");
        println!("{flaws:?}: {caught}");
    }
}

#[test]
fn the_lease_that_is_gone_and_the_epoch_that_has_grown_are_each_fence_enough() {
    // A claim raises the epoch in any case, and what waits takes neither a finish nor a failure.
    for flaws in
        [&[Flaw::ReapWithoutBump][..], &[Flaw::FenceByJob], &[Flaw::ReapWithoutBump, Flaw::FenceByJob]]
    {
        check(flaws).unwrap();
    }
}
