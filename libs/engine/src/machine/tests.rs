//! The engine's half of the control protocol.

use std::sync::mpsc;

use ovms_proto::control::{Event, FailureKind, FromVmm, MachineState, Timeline};

use super::*;
use crate::stage::{stage, Stage};

#[test]
fn a_life_is_told_in_order_and_leaves_nothing() {
    let stage = stage();
    let steps = vec![("kvm".to_owned(), 5)];
    stage.say(&FromVmm::Configured { timeline: Timeline { steps } });
    stage.start();
    stage.say(&FromVmm::Event(Event::FirstExit { micros: 50 }));
    let MachineEvent::FirstExit { micros: first_exit } = stage.event() else { panic!("no first exit") };
    let machine = &stage.machine;
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| machine.pause());
        stage.answer(Command::Pause);
        pausing.join().unwrap().unwrap();
        assert_eq!(stage.machine.status().state, State::Paused);
        let resuming = scope.spawn(|| machine.resume());
        stage.answer(Command::Resume);
        resuming.join().unwrap().unwrap();
    });
    assert_eq!([stage.event(), stage.event()], [MachineEvent::Paused, MachineEvent::Resumed]);
    stage.say(&FromVmm::Event(Event::Exited(ExitReason::PowerOff)));
    let exit = stage.machine.wait_timeout(Duration::from_secs(10)).expect("one that does not leave is killed");
    assert_eq!((exit.status, &exit.reason), (0, &ExitReason::PowerOff));
    assert_eq!(stage.event(), MachineEvent::Exited(exit.clone()));
    let timeline = stage.machine.timeline();
    let at = |step: &str| timeline.iter().find(|(name, _)| name == step).unwrap().1;
    assert!(at("vmm kvm") >= 105);
    assert_eq!(at("vmm first exit"), at("vmm kvm") + 45);
    assert_eq!(at("vmm first exit"), first_exit);
    assert_eq!(stage.machine.delete().unwrap(), exit);
    assert_eq!(stage.machine.delete().unwrap(), exit);
    assert_eq!(stage.event(), MachineEvent::Deleted);
    assert!(stage.events.try_recv().is_err());
    assert!(!stage.runtime.path().join("machines/ns/vm1").exists());
    assert_eq!(std::fs::read_dir(stage.runtime.path().join("uids")).unwrap().count(), 0);
}

#[test]
fn many_may_wait_before_and_after_the_end() {
    let stage = stage();
    let waiting: Vec<_> = (0..5)
        .map(|_| {
            let machine = stage.machine.clone();
            std::thread::spawn(move || machine.wait())
        })
        .collect();
    stage.kill();
    for thread in waiting {
        assert_eq!(thread.join().unwrap().reason, ExitReason::Killed);
    }
    assert_eq!(stage.machine.wait().status, 137);
    let (tell, events) = mpsc::channel();
    stage.machine.subscribe(move |event| tell.send(event.clone()).unwrap());
    assert!(matches!(events.recv().unwrap(), MachineEvent::Exited(_)));
    assert_eq!(stage.machine.kill().unwrap_err().kind(), Kind::NotFound);
    assert_eq!(stage.machine.start().unwrap_err().kind(), Kind::NotFound);
}

#[test]
fn pause_of_hung_vmm_returns_unavailable_and_kills_it() {
    let stage = stage();
    stage.start();
    let err = stage.machine.pause().unwrap_err();
    assert_eq!(err.kind(), Kind::Unavailable);
    assert!(err.chain().contains("did not answer Pause"), "{}", err.chain());
    assert!(stage.fault().contains("did not answer Pause"));
}

/// A VMM that answers questions for its status, and `other` to the rest, until it has said `owes` as often as that.
fn owing(stage: &Stage, times: usize, mut other: impl FnMut(Request)) {
    let mut asked = 0;
    while asked < times {
        let Ok((request, _)) = stage.vmm.recv::<Request>() else { return };
        if request.command != Command::Status {
            other(request);
            continue;
        }
        asked += 1;
        let status = VmmStatus { state: MachineState::Running, balloon_bytes: 0, exits: 1, owes: true };
        stage.say(&FromVmm::Reply { id: request.id, result: Ok(Answer::Status(status)) });
    }
}

#[test]
fn pause_that_waits_for_a_slow_disk_is_waited_for_and_holds_nothing_up() {
    let stage = stage();
    stage.start();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let machine = &stage.machine;
        let pausing = scope.spawn(|| machine.pause());
        let mut pause = None;
        owing(&stage, 3, |request| match request.command {
            Command::Pause => pause = Some(request.id),
            other => panic!("{other:?}"),
        });
        let pressing = scope.spawn(|| machine.power_button());
        stage.answer(Command::PowerButton);
        pressing.join().unwrap().unwrap();
        assert!(!pausing.is_finished() && machine.status().state == State::Running);
        stage.say(&FromVmm::Reply { id: pause.unwrap(), result: Ok(Answer::Done) });
        pausing.join().unwrap().unwrap();
    });
    assert!(begin.elapsed() > 3 * Duration::from_secs(1), "longer than a VMM that says nothing is given");
    assert_eq!((stage.machine.status().state, stage.event()), (State::Paused, MachineEvent::Paused));
    stage.kill();
}

#[test]
fn kill_ends_a_pause_that_waits_for_a_slow_disk() {
    let stage = stage();
    stage.start();
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| stage.machine.pause());
        owing(&stage, 2, |_| ());
        stage.kill();
        assert_eq!(pausing.join().unwrap().unwrap_err().kind(), Kind::NotFound);
    });
    assert_eq!(stage.machine.wait().reason, ExitReason::Killed);
}

#[test]
fn pause_that_the_vmm_has_forgotten_returns_unavailable_and_kills_it() {
    let stage = stage();
    stage.start();
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| stage.machine.pause());
        owing(&stage, 1, |_| ());
        let (request, _) = stage.vmm.recv::<Request>().unwrap();
        let status = VmmStatus { state: MachineState::Running, balloon_bytes: 0, exits: 1, owes: false };
        stage.say(&FromVmm::Reply { id: request.id, result: Ok(Answer::Status(status)) });
        assert_eq!(pausing.join().unwrap().unwrap_err().kind(), Kind::Unavailable);
    });
    assert!(stage.fault().contains("did not answer Pause"));
}

#[test]
fn a_vmm_that_reads_nothing_does_not_hold_up_its_engine() {
    let stage = stage();
    stage.start();
    let begin = Instant::now();
    let machine = &stage.machine;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(machine.resize_console(80, 25).is_err()));
        }
    });
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    stage.fault();
}

#[test]
fn each_break_of_the_protocol_ends_that_vmm() {
    type Say = fn(&Stage);
    let cases: [(Say, &str); 6] = [
        (|stage| stage.say(&FromVmm::Reply { id: 99, result: Ok(Answer::Done) }), "an answer to no request"),
        (
            |stage| (0..2).for_each(|_| stage.say(&FromVmm::Configured { timeline: Timeline::default() })),
            "configured twice",
        ),
        (|stage| (0..2).for_each(|_| stage.say(&FromVmm::Event(Event::FirstExit { micros: 1 }))), "second first exit"),
        (|stage| stage.vmm.send(&"what?", &[]).unwrap(), "cannot be read"),
        (|stage| stage.vmm.send(&serde_json::json!({"event": {"exited": "bored"}}), &[]).unwrap(), "cannot be read"),
        (
            |stage| {
                // What stays unread must fit the socket's buffer: this VMM cannot be killed while it waits.
                let flood = FromVmm::Failed { kind: FailureKind::Other, message: "x".repeat(100) };
                (0..100).for_each(|_| stage.say(&flood));
            },
            "failed twice",
        ),
    ];
    for (say, expected) in cases {
        let stage = stage();
        say(&stage);
        let message = stage.fault();
        assert!(message.contains(expected), "{message} lacks {expected}");
        assert!(message.len() < 5000);
    }
}

#[test]
fn a_vmm_that_closes_its_socket_and_stays_is_killed() {
    let Stage { machine, vmm, events: _events, runtime: _runtime, .. } = stage();
    drop(vmm);
    let exit = machine.wait_timeout(Duration::from_secs(10)).expect("it is killed");
    assert_eq!(exit.status, 137);
}

#[test]
fn the_reason_of_a_failed_vmm_is_its_own() {
    let stage = stage();
    stage.say(&FromVmm::Failed { kind: FailureKind::Other, message: "the kernel\nis none".into() });
    assert_eq!(stage.fault(), "the kernelis none");
}

#[test]
fn what_the_vmm_logs_is_read_and_the_writer_never_blocks_the_monitor() {
    use std::io::Write;
    let mut stage = stage();
    let mut log = std::mem::replace(&mut stage.log, tempfile::tempfile().unwrap());
    let writer = std::thread::spawn(move || while log.write_all(&[b'x'; 4096]).is_ok() {});
    stage.start();
    stage.kill();
    writer.join().unwrap();
}

#[test]
fn states_forbid_what_makes_no_sense() {
    let stage = stage();
    assert_eq!(stage.machine.pause().unwrap_err().kind(), Kind::FailedPrecondition);
    stage.start();
    assert_eq!(stage.machine.start().unwrap_err().kind(), Kind::FailedPrecondition);
    assert_eq!(stage.machine.delete().unwrap_err().kind(), Kind::FailedPrecondition);
    assert_eq!(stage.machine.stats().unwrap_err().kind(), Kind::Unavailable);
    stage.kill();
}

#[test]
fn request_to_an_ended_machine_returns_not_found_and_holds_nobody_up() {
    let stage = stage();
    stage.start();
    stage.kill();
    let (machine, (tell, told)) = (stage.machine.clone(), mpsc::channel());
    std::thread::spawn(move || tell.send(machine.resize_console(80, 24).unwrap_err().kind()));
    assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(Kind::NotFound));
    assert_eq!(stage.machine.status().state, State::Stopped);
}

#[test]
fn a_machine_that_was_only_created_ends_by_power_button_and_by_delete() {
    let pressed = stage();
    pressed.machine.power_button().unwrap();
    assert_eq!(pressed.machine.wait().status, 137);
    let deleted = stage();
    assert_eq!(deleted.machine.delete().unwrap().status, 137);
}

#[test]
fn update_below_what_the_guest_gives_returns_failed_precondition() {
    let stage = stage();
    stage.start();
    let (stop, stopped) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let vmm = &stage.vmm;
        scope.spawn(move || {
            let mut asked = Vec::new();
            while stopped.try_recv().is_err() {
                let Ok((request, _)) = vmm.recv::<Request>() else { break };
                let status = VmmStatus { state: MachineState::Running, balloon_bytes: 0, exits: 1, owes: false };
                let answer = match request.command {
                    Command::Status => Answer::Status(status),
                    Command::Balloon { bytes } => {
                        asked.push(bytes);
                        Answer::Done
                    }
                    other => panic!("{other:?}"),
                };
                vmm.send(&FromVmm::Reply { id: request.id, result: Ok(answer) }, &[]).unwrap();
                if asked.len() == 2 {
                    break;
                }
            }
            assert_eq!(asked, [32 << 20, 0]);
        });
        let err = stage.machine.update(&Limits { memory: Some(32 << 20), ..Limits::default() }).unwrap_err();
        assert_eq!(err.kind(), Kind::FailedPrecondition, "{}", err.chain());
        let _ = stop.send(());
    });
    stage.kill();
}

#[test]
fn the_record_follows_the_state() {
    let stage = stage();
    let state = || crate::record::read(stage.runtime.path(), "ns", "vm1").unwrap().unwrap();
    stage.start();
    assert_eq!(state().state, State::Running);
    stage.kill();
    let record = state();
    assert_eq!(record.state, State::Stopped);
    assert_eq!(record.exit.unwrap().status, 137);
}
