//! A stock Linux kernel in the real VMM. Needs a host with svm or vmx (natively, or the nested host of test/testbed) and
//! a directory with `vmlinuz` and `initrd.img`, named by OVMS_LINUX; skipped without one.

mod common;

use std::fs::File;
use std::path::PathBuf;

use common::Setup;
use ovms_proto::control::Command;

fn linux() -> Option<(File, File)> {
    let directory = PathBuf::from(std::env::var_os("OVMS_LINUX")?);
    let open = |name: &str| File::open(directory.join(name)).unwrap_or_else(|err| panic!("{name}: {err}"));
    Some((open("vmlinuz"), open("initrd.img")))
}

#[test]
#[ignore = "needs svm or vmx and OVMS_LINUX"]
fn stock_kernel_reaches_its_init() {
    let Some((kernel, initrd)) = linux() else {
        eprintln!("skipped: OVMS_LINUX names no directory with vmlinuz and initrd.img");
        return;
    };
    let vcpus = std::env::var("OVMS_CPUS").map_or(1, |cpus| cpus.parse().unwrap());
    let args = std::env::var("OVMS_ARGS").unwrap_or_else(|_| "console=ttyS0 panic=-1".into());
    let mut vmm = Setup::new(kernel).initrd(initrd).memory(512 << 20).vcpus(vcpus).args(&args).start();
    eprintln!("{:?}", vmm.timeline);
    vmm.command(Command::Run);
    let said = vmm.expect("Run /init as init process");
    eprintln!("{said}");
    vmm.command(Command::Kill);
}
