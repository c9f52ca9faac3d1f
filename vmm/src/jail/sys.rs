//! Capabilities by raw system calls: there is no libc wrapper for `capset`.

use nix::errno::Errno;

/// `_LINUX_CAPABILITY_VERSION_3` of the kernel's include/uapi/linux/capability.h.
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`; version 3 takes two, for 64 capabilities.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Takes every capability that this kernel knows out of the bounding set, and the ambient set as a whole.
pub(super) fn drop_bounding_set() -> Result<(), Errno> {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory of ours.
        let rc = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
        match Errno::result(rc) {
            Ok(_) => (),
            // The first number that the kernel does not know ends the list.
            Err(Errno::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL touches no memory of ours.
    let rc = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0) };
    Errno::result(rc).map(drop)
}

/// Empties the effective, permitted and inheritable sets of the calling thread.
pub(super) fn drop_capabilities() -> Result<(), Errno> {
    let mut header = Header { version: CAPABILITY_VERSION_3, pid: 0 };
    let data = [Data::default(); 2];
    // SAFETY: both pointers are to live values laid out as version 3 of the call wants them: a header, and two data
    // blocks that it only reads.
    let rc = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    Errno::result(rc).map(drop)
}
