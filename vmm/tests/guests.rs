//! Bare-metal guests in the real VMM: what each prints and how it ends.

mod common;

use common::{guest, run, Disk, Setup};
use ovms_proto::control::{Answer, Command, Event, ExitReason, MachineState};

#[test]
#[ignore = "needs /dev/kvm"]
fn hello_prints_its_line_and_powers_off() {
    let (reason, said, status) = run(Setup::new(guest("hello")));
    assert_eq!((reason, said.as_str(), status), (ExitReason::PowerOff, "hello from the guest\n", 0));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn command_line_reaches_a_pvh_guest_and_a_64_bit_guest() {
    for name in ["hello", "hello64"] {
        let (reason, said, _) = run(Setup::new(guest(name)).args("one two=3"));
        assert_eq!(
            (reason, said.as_str()),
            (ExitReason::PowerOff, "hello from the guest\nargs: one two=3\n"),
            "{name}"
        );
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn typed_text_comes_back_from_echo() {
    let mut vmm = Setup::new(guest("echo")).start();
    vmm.type_text("typed before it runs ");
    vmm.command(Command::Run);
    vmm.expect("typed before it runs ");
    vmm.type_text(&"0123456789".repeat(100));
    vmm.type_text("!q");
    let (reason, said, _) = vmm.end();
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(said, format!("echo ready\ntyped before it runs {}!bye\n", "0123456789".repeat(100)));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn resets_end_the_machine_with_status_0() {
    for args in ["", "by=1"] {
        let (reason, said, status) = run(Setup::new(guest("reboot")).args(args));
        assert_eq!((reason, said.as_str(), status), (ExitReason::Reset, "reset\n", 0), "{args}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_panic_ends_the_machine_with_status_134() {
    let (reason, said, status) = run(Setup::new(guest("panic")));
    assert_eq!((reason, said.as_str(), status), (ExitReason::Panic, "panic\n", 134));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn triple_fault_ends_the_machine_with_status_139() {
    let (reason, said, status) = run(Setup::new(guest("triple")));
    assert_eq!((reason, said.as_str(), status), (ExitReason::TripleFault, "triple fault\n", 139));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn power_button_reaches_the_guest() {
    let mut vmm = Setup::new(guest("spin")).start();
    vmm.command(Command::Run);
    vmm.expect("tick 1\n");
    vmm.command(Command::PowerButton);
    let (reason, said, status) = vmm.end();
    assert_eq!((reason, status), (ExitReason::PowerOff, 0));
    assert!(said.ends_with("power button\n"), "{said}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn pause_stops_the_guest_and_resume_lets_it_go_on() {
    let mut vmm = Setup::new(guest("spin")).start();
    assert_eq!(vmm.status().state, MachineState::Configured);
    assert!(vmm.try_command(Command::Resume).unwrap_err().contains("not been started"));
    vmm.command(Command::Run);
    assert!(vmm.try_command(Command::Run).unwrap_err().contains("started before"));
    vmm.expect("tick 2\n");
    for _ in 0..20 {
        vmm.command(Command::Pause);
        let exits = vmm.status().exits;
        std::thread::sleep(std::time::Duration::from_millis(20));
        vmm.drain();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(vmm.drain(), "", "a paused guest says nothing");
        assert_eq!((vmm.status().exits, vmm.status().state), (exits, MachineState::Paused));
        vmm.command(Command::Resume);
        vmm.expect("tick");
    }
    vmm.command(Command::PowerButton);
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn kill_ends_a_spinning_guest_with_status_137() {
    let mut vmm = Setup::new(guest("spin")).args("quiet=1").start();
    vmm.command(Command::Run);
    vmm.expect("tick 0\n");
    vmm.command(Command::Kill);
    let (reason, _, status) = vmm.end();
    assert_eq!((reason, status), (ExitReason::Killed, 137));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn end_of_the_control_socket_ends_the_machine() {
    let mut vmm = Setup::new(guest("spin")).args("quiet=1").start();
    vmm.command(Command::Run);
    vmm.expect("tick 0\n");
    vmm.hang_up();
    assert_eq!(vmm.child.wait().unwrap().code(), Some(137));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn first_exit_is_reported_before_the_end() {
    let mut vmm = Setup::new(guest("echo")).start();
    vmm.command(Command::Run);
    vmm.expect("echo ready\n");
    vmm.status();
    assert!(matches!(vmm.events(), [Event::FirstExit { .. }]), "{:?}", vmm.events());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn processors_come_up_by_init_and_sipi() {
    for cpus in [1, 2, 4, 32] {
        let (reason, said, _) = run(Setup::new(guest("smp")).vcpus(cpus).args(&format!("cpus={cpus}")));
        assert_eq!((reason, said), (ExitReason::PowerOff, format!("cpus {cpus}\n")));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn four_processors_pause_and_end_together() {
    let mut vmm = Setup::new(guest("spin")).vcpus(4).start();
    vmm.command(Command::Run);
    vmm.expect("tick 1\n");
    vmm.command(Command::Pause);
    vmm.command(Command::Pause);
    vmm.command(Command::Resume);
    vmm.command(Command::PowerButton);
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_of_every_size_can_be_touched_to_its_top() {
    for (size, top) in [(32 << 20, "0x2000000"), (3 << 30, "0xc0000000"), (4 << 30, "0x140000000")] {
        let (reason, said, _) = run(Setup::new(guest("memtop")).memory(size));
        let hole = (0x10_0000 - 0x9_fc00) as u64;
        assert_eq!(reason, ExitReason::PowerOff);
        assert!(said.ends_with(&format!("ram {} top {top}\n", size - hole)), "{said}");
        assert!(!said.contains("does not hold"), "{said}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn console_that_nobody_reads_stops_the_guest_but_not_its_owner() {
    let mut vmm = Setup::new(guest("spin")).args("period=1").start();
    vmm.command(Command::Run);
    let mut before = vmm.status().exits;
    loop {
        std::thread::sleep(std::time::Duration::from_millis(300));
        let now = vmm.status().exits;
        if now == before {
            break;
        }
        before = now;
    }
    vmm.command(Command::Pause);
    vmm.command(Command::Resume);
    vmm.command(Command::Kill);
    assert_eq!(vmm.end().2, 137);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn disk_reads_writes_and_keeps_what_was_flushed() {
    let disk = Disk::new(1 << 20);
    for round in 0..2 {
        let setup = disk.add_to(Setup::new(guest("disk")).args(&format!("sector={}", 3 + round)));
        let (reason, said, _) = run(setup);
        assert_eq!((reason, said.as_str()), (ExitReason::PowerOff, "sector 0: \ndisk good\n"));
    }
    assert!(has_pattern(&disk, 1, 3) && has_pattern(&disk, 1, 4) && !has_pattern(&disk, 1, 5));
}

fn has_pattern(disk: &Disk, tops: usize, sector: u64) -> bool {
    let mut data = [0u8; 512];
    disk.open(tops).read_at(sector * 512, &mut data).unwrap();
    data.iter().enumerate().all(|(at, byte)| *byte == (at * 7 + 3) as u8)
}

#[test]
#[ignore = "needs /dev/kvm"]
fn frozen_top_keeps_what_was_written_before_and_the_new_one_takes_the_rest() {
    let mut disk = Disk::new(1 << 20);
    let mut vmm = disk.add_to(Setup::new(guest("disk")).args("sector=3 then=9")).start();
    vmm.command(Command::Run);
    vmm.expect("disk good\n");
    let freeze = Command::FreezeDisk { disk: 0 };
    assert!(vmm.try_command(freeze.clone()).unwrap_err().contains("must come with the command"));
    let top = disk.add_top();
    assert_eq!(vmm.try_command_with(freeze, &top), Ok(Answer::Done));
    vmm.type_text("!");
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
    assert!(has_pattern(&disk, 1, 3) && !has_pattern(&disk, 1, 9), "the old top is as it was");
    assert!(has_pattern(&disk, 2, 3) && has_pattern(&disk, 2, 9));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn command_for_a_disk_that_is_not_there_is_refused() {
    let mut vmm = Setup::new(guest("echo")).start();
    vmm.command(Command::Run);
    let err = vmm.try_command(Command::FreezeDisk { disk: 0 }).unwrap_err();
    assert_eq!(err, "the disk is as it was: the machine has no disk 0");
    vmm.command(Command::ResizeConsole { columns: 80, rows: 25 });
    vmm.type_text("q");
    assert_eq!(vmm.end().0, ExitReason::PowerOff);
}

/// The two numbers that the guest `rng` has drawn.
fn drawn() -> [String; 2] {
    let (reason, said, _) = run(Setup::new(guest("rng")));
    assert_eq!(reason, ExitReason::PowerOff, "{said}");
    let words: Vec<_> = said.split_ascii_whitespace().map(str::to_owned).collect();
    match words.as_slice() {
        [word, first, second] if word == "random" => [first.clone(), second.clone()],
        _ => panic!("{said}"),
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn entropy_source_gives_each_request_of_each_machine_other_bytes() {
    let mut all = [drawn(), drawn()].concat();
    assert!(all.iter().all(|number| number.len() > 8), "64 bits that begin with 32 zeroes are no accident: {all:?}");
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 4, "{all:?}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn virtio_console_speaks_hears_and_has_the_size_that_was_set_before_the_start() {
    let mut vmm = Setup::new(guest("hvc")).args("console=hvc0 echo=1").start();
    vmm.command(Command::ResizeConsole { columns: 132, rows: 43 });
    vmm.command(Command::Run);
    vmm.expect("console 132x43\n");
    vmm.expect("hello from hvc0\n");
    let typed = "0123456789 typed at once, more than one buffer\n";
    vmm.type_text(typed);
    vmm.expect(typed);
    vmm.type_text("q");
    let (reason, said, _) = vmm.end();
    assert_eq!(reason, ExitReason::PowerOff);
    assert_eq!(said, format!("console 132x43\nhello from hvc0\n{typed}q"));
}

/// Bytes of memory that a process has.
fn resident(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn free_pages_that_the_guest_reports_are_given_back_to_the_host() {
    const FILL: u64 = 32 << 20;
    let mut vmm = Setup::new(guest("report")).args("fill=32").start();
    let empty = resident(vmm.child.id());
    vmm.command(Command::Run);
    vmm.expect("filled\n");
    let full = resident(vmm.child.id());
    assert!(full > empty + FILL, "{empty} before, {full} full");
    vmm.type_text("!");
    vmm.expect("reported\n");
    let reported = resident(vmm.child.id());
    assert!(reported + FILL < full + (1 << 20), "{full} full, {reported} reported");
    vmm.type_text("!");
    let (reason, said, _) = vmm.end();
    assert_eq!((reason, said.as_str()), (ExitReason::PowerOff, "filled\nreported\nall zero\n"));
}
