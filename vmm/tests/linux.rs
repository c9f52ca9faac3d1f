//! A stock Linux kernel in the real VMM. Needs a host with svm or vmx (natively, or the nested host of test/testbed) and
//! a directory with `vmlinuz`, `initrd.img` and a static `busybox`, named by OVMS_LINUX. `make e2e` has both (the case
//! `debian.a_stock_kernel_in_the_vmm_alone`); `make test-kvm`, which has neither, leaves these tests out by their name.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::capture::Inside;
use common::Setup;
use ovms_proto::control::Command;

/// How long an emulated processor may take for a boot.
const BOOT: Duration = Duration::from_secs(300);

/// Says, five times a second, how often it has, the time and a random number.
const INIT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /dev
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
n=0
while :; do
    echo \"tick $n at $($b date +%s) random $($b od -An -tx8 -N8 /dev/urandom) uptime $($b cut -d' ' -f1 /proc/uptime)\"
    n=$((n + 1))
    $b usleep 200000
done
";

/// A file of the kernel that is to be booted.
fn linux(name: &str) -> File {
    let directory = std::env::var_os("OVMS_LINUX");
    let directory = directory.expect("OVMS_LINUX names no directory with vmlinuz, initrd.img and busybox");
    let path = PathBuf::from(directory).join(name);
    File::open(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()))
}

#[test]
#[ignore = "needs svm or vmx, and a stock kernel: set OVMS_LINUX"]
fn stock_kernel_reaches_its_init() {
    let vcpus = std::env::var("OVMS_CPUS").map_or(1, |cpus| cpus.parse().unwrap());
    let args = std::env::var("OVMS_ARGS").unwrap_or_else(|_| "console=ttyS0 panic=-1".into());
    let setup = Setup::new(linux("vmlinuz")).initrd(linux("initrd.img")).memory(512 << 20);
    let mut vmm = setup.vcpus(vcpus).args(&args).start();
    eprintln!("{:?}", vmm.timeline);
    vmm.command(Command::Run);
    let said = vmm.expect_within("Run /init as init process", BOOT);
    eprintln!("{said}");
    vmm.command(Command::Kill);
}

/// An archive in the format that kernels unpack (Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(files: &[(&str, u32, &[u8])]) -> File {
    let mut bytes = Vec::new();
    for (inode, (name, mode, data)) in files.iter().copied().chain([("TRAILER!!!", 0, &[][..])]).enumerate() {
        let fields = [inode as u32 + 1, mode, 0, 0, 1, 0, data.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        write!(bytes, "070701").unwrap();
        fields.iter().for_each(|field| write!(bytes, "{field:08x}").unwrap());
        for part in [[name.as_bytes(), &[0]].concat(), data.to_vec()] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

/// What a line of [`INIT`] says: number, seconds since 1970, random number.
fn ticks(said: &str) -> Vec<(u64, u64, String)> {
    let line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            ["tick", tick, "at", time, "random", random, "uptime", _] => {
                Some((tick.parse().ok()?, time.parse().ok()?, (*random).to_owned()))
            }
            _ => None,
        }
    };
    said.lines().filter_map(line).collect()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

#[test]
#[ignore = "needs svm or vmx, and a stock kernel: set OVMS_LINUX"]
fn stock_kernel_goes_on_from_a_snapshot_with_the_right_time_and_its_own_randomness() {
    let mut busybox = Vec::new();
    linux("busybox").read_to_end(&mut busybox).unwrap();
    let directory = 0o040_755;
    let files: [(&str, u32, &[u8]); 3] =
        [("bin", directory, b""), ("bin/busybox", 0o100_755, &busybox), ("init", 0o100_755, INIT.as_bytes())];
    let memory = 256 << 20;
    let setup = Setup::new(linux("vmlinuz")).initrd(archive(&files)).memory(memory);
    let mut origin = Inside::boot(setup.args("console=ttyS0 panic=-1"));
    let last = ticks(origin.run_until("tick 6 ")).last().unwrap().0;
    let snapshot = origin.save();
    std::thread::sleep(Duration::from_secs(5));
    let mut clones = [(); 2].map(|()| {
        let mut clone = snapshot.setup().start();
        eprintln!("{:?}", clone.timeline);
        clone.command(Command::Run);
        clone.expect_within(&format!("tick {} ", last + 5), BOOT);
        let said = clone.expect_within("virtual machine fork", BOOT);
        let off = ticks(&said).last().unwrap().1.abs_diff(now());
        assert!(off <= 3, "{off} s: {said}");
        assert!(!said.contains("Linux version"), "it has booted again: {said}");
        (clone, said)
    });
    let [one, other] = &clones.each_ref().map(|(_, said)| ticks(said));
    eprintln!("{one:?}\n{other:?}");
    // One line was being said when the snapshot was taken.
    assert!(last < one[0].0 && one[0].0 <= last + 2, "{last}, then {one:?}");
    let both = one.iter().filter_map(|one| other.iter().find(|other| other.0 == one.0).map(|other| (one, other)));
    let both: Vec<_> = both.collect();
    assert!(both.len() >= 2, "{both:?}");
    // What was drawn at the very moment of the restore may be the same; what is drawn after the guest was told, never.
    assert!(both.iter().skip(1).all(|(one, other)| one.2 != other.2), "{both:?}");
    clones.iter_mut().for_each(|(clone, _)| clone.command(Command::Kill));
}
