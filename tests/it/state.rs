//! The life of a job, every state against every change.

use secateur::job::report::FailureKind;
use secateur::job::state::{Change, JobState, Wish};

const KINDS: [FailureKind; 10] = [
    FailureKind::Spec,
    FailureKind::Model,
    FailureKind::Data,
    FailureKind::OutOfMemory,
    FailureKind::Device,
    FailureKind::Storage,
    FailureKind::AttemptsSpent,
    FailureKind::QueueDeadline,
    FailureKind::RunDeadline,
    FailureKind::Bug,
];

fn changes() -> Vec<Change> {
    let mut all = vec![
        Change::Claim,
        Change::RequestCancel,
        Change::RequestPause,
        Change::Resume,
        Change::Finish,
        Change::Expire,
    ];
    for kind in KINDS {
        for retries_left in [false, true] {
            all.push(Change::Fail { kind, retries_left });
        }
    }
    for wish in [None, Some(Wish::Cancel), Some(Wish::Pause)] {
        all.push(Change::Stopped { wish });
        for crashes_left in [false, true] {
            all.push(Change::LeaseExpired { wish, crashes_left });
        }
    }
    all
}

/// The table as SERVICE.md has it, written down a second time and from the other side.
fn expected(from: JobState, change: Change) -> Option<JobState> {
    use JobState::{Cancelled, Failed, Paused, Queued, Running, Succeeded};
    let by_wish = |wish| match wish {
        None => Queued,
        Some(Wish::Pause) => Paused,
        Some(Wish::Cancel) => Cancelled,
    };
    match from {
        Succeeded | Failed | Cancelled => None,
        Queued => match change {
            Change::Claim => Some(Running),
            Change::RequestCancel => Some(Cancelled),
            Change::RequestPause => Some(Paused),
            Change::Expire => Some(Failed),
            _ => None,
        },
        Paused => match change {
            Change::Resume => Some(Queued),
            Change::RequestCancel => Some(Cancelled),
            _ => None,
        },
        Running => match change {
            Change::RequestCancel | Change::RequestPause => Some(Running),
            Change::Finish => Some(Succeeded),
            Change::Fail { kind: FailureKind::Device | FailureKind::Storage, retries_left: true } => {
                Some(Queued)
            }
            Change::Fail { .. } | Change::LeaseExpired { wish: None, crashes_left: false } => Some(Failed),
            Change::Stopped { wish } | Change::LeaseExpired { wish, .. } => Some(by_wish(wish)),
            Change::Claim | Change::Resume | Change::Expire => None,
        },
    }
}

#[test]
fn every_state_takes_exactly_the_changes_it_should() {
    for from in JobState::ALL {
        for change in changes() {
            assert_eq!(from.after(change).ok(), expected(from, change), "{from} {change:?}");
        }
    }
}

#[test]
fn terminal_states_never_change() {
    for from in JobState::ALL.into_iter().filter(|s| s.is_terminal()) {
        for change in changes() {
            let error = from.after(change).unwrap_err();
            assert_eq!((error.from, error.change), (from, change));
            assert!(error.to_string().contains(from.name()));
        }
    }
}

#[test]
fn a_state_is_read_back_from_its_name() {
    for state in JobState::ALL {
        assert_eq!(state.name().parse(), Ok(state));
        assert_eq!(serde_json::to_value(state).unwrap(), state.name());
    }
    assert!("done".parse::<JobState>().unwrap_err().contains("queued, running"));
}
