//! Machines whose disk does not answer for a while: nobody is kept from them, and nothing is lost.

mod common;

use std::fs::File;
use std::time::Duration;

use common::{guest, Disk, Setup, Stoppable, Vmm};
use ovms_proto::control::{Answer, Command, ExitReason, MachineState, SnapshotCommand};

/// Longer than the owner waits before it turns to others.
const WHILE: Duration = Duration::from_millis(300);

/// The guest `disk`, of which a write is in flight on a file system that has stopped, and the files of another top.
fn stuck(place: &Stoppable) -> (Vmm, Disk, [File; 2]) {
    let mut disk = Disk::new_in(place.path(), 1 << 20);
    let mut vmm = disk.add_to(Setup::new(guest("disk")).args("sector=3 then=9")).start();
    let top = disk.add_top();
    vmm.command(Command::Run);
    vmm.expect("disk good\n");
    place.stop();
    vmm.type_text("!");
    std::thread::sleep(WHILE);
    assert!(!vmm.drain().contains("disk good\ndisk good"), "the disk has stopped");
    (vmm, disk, top)
}

fn assert_owes(vmm: &mut Vmm, state: MachineState) {
    let status = vmm.status();
    assert_eq!((status.state, status.owes), (state, true));
}

fn finish(mut vmm: Vmm, disk: &Disk, tops: usize) {
    vmm.expect("disk good\n");
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
    let mut data = [0u8; 512];
    disk.open(tops).read_at(9 * 512, &mut data).unwrap();
    assert!(data.iter().enumerate().all(|(at, byte)| *byte == (at * 7 + 3) as u8), "the write was not lost");
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn pause_waits_for_the_disk_and_others_are_answered_meanwhile() {
    let place = Stoppable::new();
    let (mut vmm, disk, _) = stuck(&place);
    let pauses = [(); 2].map(|()| vmm.ask(Command::Pause, &[]));
    std::thread::sleep(WHILE);
    assert_owes(&mut vmm, MachineState::Running);
    vmm.command(Command::PowerButton);
    vmm.command(Command::ResizeConsole { columns: 80, rows: 25 });
    place.go_on();
    for pause in pauses {
        assert_eq!(vmm.answer(pause), Ok(Answer::Done));
    }
    let status = vmm.status();
    assert_eq!((status.state, status.owes), (MachineState::Paused, false));
    vmm.command(Command::Resume);
    finish(vmm, &disk, 1);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn resume_gives_up_a_pause_that_waits_for_the_disk() {
    let place = Stoppable::new();
    let (mut vmm, disk, _) = stuck(&place);
    let pause = vmm.ask(Command::Pause, &[]);
    std::thread::sleep(WHILE);
    vmm.command(Command::Resume);
    assert_eq!(vmm.answer(pause), Err("the machine was told to go on before it stood still".into()));
    let status = vmm.status();
    assert_eq!((status.state, status.owes), (MachineState::Running, false));
    place.go_on();
    finish(vmm, &disk, 1);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn freeze_waits_for_the_disk_and_others_are_answered_meanwhile() {
    let place = Stoppable::new();
    let (mut vmm, disk, top) = stuck(&place);
    let again = top.each_ref().map(|file| file.try_clone().unwrap());
    let freeze = vmm.ask(Command::FreezeDisk { disk: 0 }, &top);
    std::thread::sleep(WHILE);
    assert_owes(&mut vmm, MachineState::Running);
    let second = vmm.try_command_with(Command::FreezeDisk { disk: 0 }, &again);
    assert!(second.unwrap_err().contains("a disk of the machine is being frozen"));
    vmm.command(Command::PowerButton);
    place.go_on();
    assert_eq!(vmm.answer(freeze), Ok(Answer::Done));
    finish(vmm, &disk, 2);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn snapshot_whose_instant_waits_for_the_disk_can_be_cancelled() {
    let place = Stoppable::new();
    let (mut vmm, disk, [data, map]) = stuck(&place);
    let blob = tempfile::tempfile().unwrap();
    let snapshot = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[blob, data, map]);
    std::thread::sleep(3 * WHILE);
    assert_owes(&mut vmm, MachineState::Running);
    vmm.command(Command::CancelSnapshot);
    assert!(vmm.answer(snapshot).unwrap_err().contains("cancelled"));
    place.go_on();
    finish(vmm, &disk, 1);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn snapshot_and_pause_that_wait_for_the_disk_both_come_about() {
    let place = Stoppable::new();
    let (mut vmm, disk, [data, map]) = stuck(&place);
    let blob = tempfile::tempfile().unwrap();
    let snapshot = vmm.ask(Command::Snapshot(SnapshotCommand::default()), &[blob, data, map]);
    let pause = vmm.ask(Command::Pause, &[]);
    std::thread::sleep(3 * WHILE);
    assert_owes(&mut vmm, MachineState::Running);
    place.go_on();
    assert_eq!(vmm.answer(pause), Ok(Answer::Done));
    assert!(matches!(vmm.answer(snapshot), Ok(Answer::Snapshot(_))));
    assert_eq!(vmm.status().state, MachineState::Paused);
    vmm.command(Command::Resume);
    finish(vmm, &disk, 2);
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn power_off_waits_for_the_disk_and_others_are_answered_meanwhile() {
    let place = Stoppable::new();
    let disk = Disk::new_in(place.path(), 1 << 20);
    let mut vmm = disk.add_to(Setup::new(guest("disk")).args("sector=9 flush=0 wait=1")).start();
    vmm.command(Command::Run);
    vmm.expect("disk good\n");
    place.stop();
    vmm.type_text("!");
    std::thread::sleep(WHILE);
    assert_owes(&mut vmm, MachineState::Exited);
    assert!(vmm.try_command(Command::PowerButton).unwrap_err().contains("the guest is gone"));
    place.go_on();
    finish(vmm, &disk, 1);
}
