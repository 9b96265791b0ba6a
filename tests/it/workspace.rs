//! Results by content.

use std::cell::Cell;
use std::fs;

use secateur::engine::workspace::{Recorded, Workspace};
use secateur::engine::{Error, Result};
use secateur::job::progress::{Event, Stage};

use crate::support::rig::Rig;

/// Runs a stage whose work counts how often it is done and leaves a file.
fn once(rig: &Rig, workspace: &Workspace, inputs: u32, count: &Cell<u32>) -> Result<Recorded<u32>> {
    workspace.once(rig.cx(Stage::Select), &inputs, |_| {
        count.set(count.get() + 1);
        let part = workspace.part("result")?;
        fs::write(part.join("file"), inputs.to_string())?;
        workspace.publish(&part, "result")?;
        Ok((inputs * 2, vec!["result".into()]))
    })
}

#[test]
fn the_same_inputs_are_worked_on_once_and_others_anew() {
    let (rig, count) = (Rig::new(), Cell::new(0));
    let workspace = rig.workspace();
    let first = once(&rig, &workspace, 1, &count).unwrap();
    let second = once(&rig, &workspace, 1, &count).unwrap();
    assert_eq!((first.value, second.value, count.get()), (2, 2, 1));
    assert_eq!((first.reused, second.reused), (false, true));
    assert_eq!(first.files, second.files);
    assert_eq!(first.files.keys().collect::<Vec<_>>(), ["result/file"]);
    once(&rig, &workspace, 3, &count).unwrap();
    assert_eq!(count.get(), 2);
    assert_eq!(fs::read_to_string(rig.path("workspace/selection.json")).unwrap(), "6\n");
    let told: Vec<_> = rig.ear.finished();
    assert_eq!(told, [(Stage::Select, false), (Stage::Select, true), (Stage::Select, false)]);
}

#[test]
fn a_record_survives_the_process() {
    let (rig, count) = (Rig::new(), Cell::new(0));
    once(&rig, &rig.workspace(), 1, &count).unwrap();
    fs::remove_file(rig.path("workspace/selection.json")).unwrap();
    assert!(once(&rig, &rig.workspace(), 1, &count).unwrap().reused);
    assert_eq!(fs::read_to_string(rig.path("workspace/selection.json")).unwrap(), "2\n");
}

#[test]
fn a_record_whose_files_were_touched_does_not_count() {
    let spoil: [fn(&Rig); 3] = [
        |rig| fs::write(rig.path("workspace/result/file"), "x").unwrap(),
        |rig| fs::remove_file(rig.path("workspace/result/file")).unwrap(),
        |rig| fs::remove_dir_all(rig.path("workspace/result")).unwrap(),
    ];
    for spoil in spoil {
        let (rig, count) = (Rig::new(), Cell::new(0));
        once(&rig, &rig.workspace(), 1, &count).unwrap();
        spoil(&rig);
        assert!(!once(&rig, &rig.workspace(), 1, &count).unwrap().reused);
        assert_eq!(count.get(), 2);
        assert_eq!(fs::read_to_string(rig.path("workspace/result/file")).unwrap(), "1");
    }
}

#[test]
fn a_half_written_record_is_done_again() {
    let (rig, count) = (Rig::new(), Cell::new(0));
    once(&rig, &rig.workspace(), 1, &count).unwrap();
    for entry in fs::read_dir(rig.path("workspace/records")).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read(&path).unwrap();
        fs::write(&path, &text[..text.len() / 2]).unwrap();
    }
    assert!(!once(&rig, &rig.workspace(), 1, &count).unwrap().reused);
    assert!(once(&rig, &rig.workspace(), 1, &count).unwrap().reused);
}

#[test]
fn work_that_fails_leaves_no_record_and_names_its_stage() {
    let rig = Rig::new();
    let workspace = rig.workspace();
    let failed = workspace.once(rig.cx(Stage::Prune), &1, |_| -> Result<(u32, Vec<String>)> {
        workspace.part("pruned")?;
        Err(Error::model("broken"))
    });
    let Err(Error::Failed(failure)) = failed else { panic!("it failed") };
    assert_eq!((failure.stage, failure.message.as_str()), (Some(Stage::Prune), "broken"));
    assert_eq!(fs::read_dir(rig.path("workspace/records")).unwrap().count(), 0);
    drop(workspace);
    drop(rig.workspace());
    assert!(!rig.path("workspace/parts").exists(), "the next run clears what was half done");
}

#[test]
fn scratch_stays_until_the_work_is_done() {
    let rig = Rig::new();
    let run = |succeed: bool| {
        rig.workspace().once(rig.cx(Stage::Heal), &1, |scratch| {
            let resumed = scratch.join("progress").exists();
            fs::create_dir_all(scratch)?;
            fs::write(scratch.join("progress"), "half way")?;
            if succeed { Ok((resumed, Vec::new())) } else { Err(Error::Stopped) }
        })
    };
    assert!(matches!(run(false), Err(Error::Stopped)));
    assert!(run(true).unwrap().value, "the second attempt finds the first one's progress");
    assert_eq!(fs::read_dir(rig.path("workspace/scratch")).unwrap().count(), 0);
}

#[test]
fn what_later_stages_said_of_another_result_goes() {
    let (rig, count) = (Rig::new(), Cell::new(0));
    let workspace = rig.workspace();
    once(&rig, &workspace, 1, &count).unwrap();
    workspace.once(rig.cx(Stage::Eval), &1, |_| Ok((5, Vec::new()))).unwrap();
    assert!(rig.path("workspace/eval.json").exists());
    once(&rig, &workspace, 2, &count).unwrap();
    assert!(!rig.path("workspace/eval.json").exists());
}

#[test]
fn a_workspace_is_held_by_one_run_at_a_time() {
    let rig = Rig::new();
    let first = rig.workspace();
    let Err(second) = Workspace::open(first.dir()) else { panic!("two runs hold one workspace") };
    assert!(second.to_string().contains("another run"), "{second}");
    drop(first);
    rig.workspace();
}

#[test]
fn a_run_that_is_asked_to_stop_starts_no_stage() {
    let mut rig = Rig::new();
    rig.ear.stop_when = Some(|event| matches!(event, Event::StageStarted { stage: Stage::Select }));
    let count = Cell::new(0);
    assert!(matches!(once(&rig, &rig.workspace(), 1, &count), Err(Error::Stopped)));
    assert_eq!(count.get(), 0);
}

#[test]
fn what_several_stages_need_is_made_once_for_the_same_inputs_and_again_when_it_cannot_be_read() {
    let (rig, count) = (Rig::new(), Cell::new(0));
    let kept = |name: &str, inputs: u32| -> u32 {
        let make = || {
            count.set(count.get() + 1);
            Ok(inputs * 2)
        };
        rig.workspace().kept(name, &inputs, make).unwrap()
    };
    assert_eq!([kept("text", 1), kept("text", 1)], [2, 2]);
    assert_eq!(count.get(), 1);
    assert_eq!([kept("text", 2), kept("other", 1)], [4, 2]);
    assert_eq!(count.get(), 3);
    for record in fs::read_dir(rig.path("workspace/records")).unwrap() {
        fs::write(record.unwrap().path(), "{").unwrap();
    }
    assert_eq!((kept("text", 1), count.get()), (2, 4));
}
