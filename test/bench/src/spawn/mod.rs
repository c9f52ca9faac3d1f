//! Spawns the VMM as the engine does: born in mount, pid, ipc and uts namespaces of its own, its control socket as
//! descriptor 3, while a thread makes the network namespace that it joins.

pub(crate) mod sys;

pub(crate) use sys::{empty_netns, jailed};
