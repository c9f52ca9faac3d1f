//! Bare-metal guests in the real VMM: what each prints and how it ends.

mod common;

use common::{guest, run, Setup};
use ovms_proto::control::ExitReason;

#[test]
#[ignore = "needs /dev/kvm"]
fn hello_prints_its_line_and_powers_off() {
    let (reason, said, status) = run(Setup::new(guest("hello")));
    assert_eq!((reason, said.as_str(), status), (ExitReason::PowerOff, "hello from the guest\n", 0));
}
