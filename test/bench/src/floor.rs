//! The floor under the start of a machine: the least that any program must do to see a guest's first byte. It opens
//! `/dev/kvm`, makes a VM with one memory slot of the size given in bytes as its only argument and one vCPU, runs three
//! real-mode instructions, and copies the byte of the guest's first port write to stdout. The benches divide by its
//! time; whatever gets better in the kernel gets better on both sides of the ratio. The byte is sent before anything is
//! taken down, so that no end of a machine counts as a part of its start. Behind the byte it prints how many
//! microseconds KVM_SET_USER_MEMORY_REGION took.

#[allow(unsafe_code, reason = "mmap and KVM_SET_USER_MEMORY_REGION")]
mod sys;

use std::error::Error;
use std::io::{stdout, Write};

use kvm_ioctls::{Kvm, VcpuExit};

/// `mov $0x80, %dx; mov $'x', %al; out %al, %dx; hlt` in 16-bit code.
const CODE: [u8; 7] = [0xba, 0x80, 0x00, 0xb0, b'x', 0xee, 0xf4];
/// Where the code lies in the guest; real mode reaches it with a zero segment.
const ENTRY: u64 = 0x1000;

fn main() -> Result<(), Box<dyn Error>> {
    let bytes: usize = std::env::args().nth(1).ok_or("usage: ovms-bench-floor BYTES")?.parse()?;
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let slot = sys::add_memory(&vm, bytes, ENTRY as usize, &CODE)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = ENTRY;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(_, data) => {
            stdout().write_all(data)?;
            stdout().flush()?;
        }
        other => return Err(format!("the guest left with {other:?} instead of its port write").into()),
    }
    print!("{}", slot.as_micros());
    Ok(())
}
