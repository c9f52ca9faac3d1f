//! Spawns the VMM as the engine does: born in mount, pid, ipc, uts and net namespaces of its own, its control socket
//! as descriptor 3.

pub(crate) mod sys;

pub(crate) use sys::jailed;
