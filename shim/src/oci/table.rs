//! What becomes of every field of the OCI runtime specification (1.3, config.md, config-linux.md, config-vm.md). A row
//! stands for its field and everything below it; the most particular row wins. `docs/oci-spec.md` repeats the rows and
//! a test compares them.

use serde_json::Value;

use super::{devices, mounts};

/// What is done with a field that is there and not empty.
#[derive(Clone, Copy)]
pub(super) enum Treatment {
    /// It has its effect.
    Applied,
    /// It has none and nobody misses it.
    Ignored,
    /// It has none, and the log says so if the function gives a sentence.
    Warned(fn(&Value) -> Option<String>),
    /// Create fails if the function (field, whole spec) gives a reason; else it is ignored.
    Refused(fn(&Value, &Value) -> Option<String>),
}

impl Treatment {
    /// The word in the documentation.
    #[cfg(test)]
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Ignored => "ignored",
            Self::Warned(_) => "ignored, with a warning",
            Self::Refused(_) => "refused",
        }
    }
}

/// One row.
pub(super) struct Row {
    /// The field, its parts joined by dots.
    pub(super) field: &'static str,
    /// What is done with it.
    pub(super) treatment: Treatment,
    /// How, or why not.
    #[cfg_attr(not(test), allow(dead_code, reason = "the documentation is compared with it"))]
    pub(super) what: &'static str,
}

/// The row of a field, if it has one of its own.
pub(super) fn find(path: &str) -> Option<&'static Row> {
    ROWS.iter().find(|row| row.field == path)
}

use Treatment::{Applied, Ignored, Refused, Warned};

const fn row(field: &'static str, treatment: Treatment, what: &'static str) -> Row {
    Row { field, treatment, what }
}

/// All rows.
#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    row("ociVersion", Applied, "handed on to hooks"),
    row("root.path", Ignored, "the machine's disks come with the rootfs mount; `rootfs/` in the bundle stays empty"),
    row("root.readonly", Applied, "the guest cannot write to its disks (`--read-only`)"),
    row("hostname", Applied, "name of the VMM's own UTS namespace; the guest sets its own"),
    row("domainname", Ignored, "the guest sets its own"),
    row("mounts", Refused(mounts::refusal), "the default file systems, resolv.conf, hosts, hostname, /dev/shm, the termination log and the service account are ignored; any other mount is refused by its destination, since without an agent it would be missing in the guest"),
    row("annotations", Applied, "`io.ovms.vcpus`, `io.ovms.memory`, `io.ovms.kernel-args`, `io.ovms.boot=cold` and `io.ovms.on-incompatible=boot` are applied, any other `io.ovms.*` is refused, all are handed on to hooks"),
    row("hooks.prestart", Applied, "run with createRuntime"),
    row("hooks.createRuntime", Applied, "run once the VMM lives in its network namespace, before Create returns"),
    row("hooks.createContainer", Refused(|_, _| Some("a virtual machine has no container namespaces to run it in".into())), "would run in the container's namespaces"),
    row("hooks.startContainer", Refused(|_, _| Some("without an agent nothing can be run in the virtual machine".into())), "would run in the container"),
    row("hooks.poststart", Applied, "run after Start"),
    row("hooks.poststop", Applied, "run at Delete, or by `delete` when the shim is gone"),

    row("process.terminal", Ignored, "the task's own `terminal` counts: the client's terminal is the serial console, raw"),
    row("process.consoleSize", Ignored, "clients send ResizePty"),
    row("process.user.uid", Refused(not_root), "only 0: who runs what is up to the guest"),
    row("process.user.gid", Refused(not_root), "only 0"),
    row("process.user.umask", Ignored, "no process of the host's choosing runs in the guest"),
    row("process.user.additionalGids", Ignored, "as above"),
    row("process.user.username", Ignored, "for Windows"),
    row("process.args", Applied, "must be those of the image: a machine without an agent cannot run others, so they are refused by name"),
    row("process.commandLine", Refused(|_, _| Some("it is for Windows".into())), "for Windows"),
    row("process.env", Warned(environment), "the guest does not see it; variables that every client sets go without a warning"),
    row("process.cwd", Ignored, "as args"),
    row("process.capabilities", Ignored, "the VMM has none"),
    row("process.rlimits", Ignored, "the VMM has limits of its own"),
    row("process.noNewPrivileges", Ignored, "always so for the VMM"),
    row("process.apparmorProfile", Ignored, "the VMM's jail is its own"),
    row("process.oomScoreAdj", Applied, "to the VMM; lowering it takes CAP_SYS_RESOURCE"),
    row("process.scheduler", Refused(|_, _| Some("the VMM's threads keep the host's scheduler".into())), "vCPU threads keep the host's"),
    row("process.selinuxLabel", Ignored, "the VMM's jail is its own"),
    row("process.ioPriority", Refused(|_, _| Some("the VMM's threads keep the host's I/O priority (use linux.resources.blockIO.weight)".into())), "vCPU threads keep the host's"),
    row("process.execCPUAffinity", Ignored, "there is no exec"),

    row("linux.namespaces", Refused(user_namespace), "network: joined by path, made empty without one, and made empty, with a warning, where the spec has none (`--net-host`); user: refused; mount: always one that holds an empty root; all others: always the VMM's own"),
    row("linux.uidMappings", Refused(|_, _| Some("the VMM has a user id of its own (remove --uidmap)".into())), "the VMM has an id of its own"),
    row("linux.gidMappings", Refused(|_, _| Some("the VMM has a group id of its own (remove --gidmap)".into())), "the VMM has an id of its own"),
    row("linux.timeOffsets", Refused(|_, _| Some("the guest has a clock of its own".into())), "the guest has a clock of its own"),
    row("linux.sysctl", Warned(sysctl), "the guest has a kernel of its own"),
    row("linux.devices", Refused(devices::refusal), "default devices are ignored, and all of them with `--privileged`, whose list is the host's; any other is refused by its path"),
    row("linux.netDevices", Refused(|_, _| Some("host network devices cannot be moved into a virtual machine".into())), "cannot be moved into a guest"),
    row("linux.cgroupsPath", Applied, "the VMM's control group: a path, or systemd's `slice:prefix:name`"),
    row("linux.seccomp", Ignored, "the VMM has filters of its own; the guest has its own kernel"),
    row("linux.rootfsPropagation", Ignored, "nothing is mounted"),
    row("linux.maskedPaths", Ignored, "the guest has its own /proc and /sys"),
    row("linux.readonlyPaths", Ignored, "the guest has its own /proc and /sys"),
    row("linux.mountLabel", Ignored, "nothing is mounted"),
    row("linux.intelRdt", Refused(|_, _| Some("resource director classes are not supported (remove --rdt-class)".into())), "not supported"),
    row("linux.memoryPolicy", Refused(|_, _| Some("memory policies are not supported (use linux.resources.cpu.mems)".into())), "not supported"),
    row("linux.personality", Ignored, "the guest has a kernel of its own"),

    row("linux.resources.devices", Ignored, "the VMM can open no device: it gets /dev/kvm as a descriptor"),
    row("linux.resources.memory.limit", Applied, "the guest's memory, rounded down to 2 MiB; the control group gets it and the VMM's overhead"),
    row("linux.resources.memory.reservation", Applied, "to the control group"),
    row("linux.resources.memory.swap", Applied, "to the control group"),
    row("linux.resources.memory.kernel", Ignored, "gone from kernels since 5.4"),
    row("linux.resources.memory.kernelTCP", Ignored, "gone from cgroup v2"),
    row("linux.resources.memory.swappiness", Warned(|_| Some("memory.swappiness is ignored".into())), "gone from cgroup v2"),
    row("linux.resources.memory.disableOOMKiller", Warned(|_| Some("memory.disableOOMKiller is ignored: a machine that could not be killed would hang".into())), "a VMM that cannot be killed would hang with its locks"),
    row("linux.resources.memory.useHierarchy", Ignored, "always so"),
    row("linux.resources.memory.checkBeforeUpdate", Ignored, "memory is taken from the guest before the limit falls"),
    row("linux.resources.cpu.shares", Applied, "to the control group"),
    row("linux.resources.cpu.quota", Applied, "to the control group; quota / period, rounded up, is the number of vCPUs"),
    row("linux.resources.cpu.period", Applied, "with quota"),
    row("linux.resources.cpu.burst", Warned(|_| Some("cpu.burst is ignored".into())), "not supported"),
    row("linux.resources.cpu.realtimeRuntime", Warned(|_| Some("cpu.realtimeRuntime is ignored: vCPUs are not realtime threads".into())), "vCPUs are no realtime threads"),
    row("linux.resources.cpu.realtimePeriod", Ignored, "with realtimeRuntime"),
    row("linux.resources.cpu.cpus", Applied, "to the control group"),
    row("linux.resources.cpu.mems", Applied, "to the control group"),
    row("linux.resources.cpu.idle", Warned(|_| Some("cpu.idle is ignored".into())), "not supported"),
    row("linux.resources.pids", Ignored, "it counts the guest's processes; the VMM's threads are as many as it needs"),
    row("linux.resources.blockIO.weight", Applied, "to the control group"),
    row("linux.resources.blockIO.leafWeight", Ignored, "gone from kernels since 5.0"),
    row("linux.resources.blockIO.weightDevice", Refused(|_, _| Some("weights of single devices are not supported".into())), "not supported"),
    row("linux.resources.blockIO.throttleReadBpsDevice", Refused(|_, _| Some("throttling of single devices is not supported".into())), "not supported"),
    row("linux.resources.blockIO.throttleWriteBpsDevice", Refused(|_, _| Some("throttling of single devices is not supported".into())), "not supported"),
    row("linux.resources.blockIO.throttleReadIOPSDevice", Refused(|_, _| Some("throttling of single devices is not supported".into())), "not supported"),
    row("linux.resources.blockIO.throttleWriteIOPSDevice", Refused(|_, _| Some("throttling of single devices is not supported".into())), "not supported"),
    row("linux.resources.hugepageLimits", Ignored, "guest memory is not on hugetlbfs"),
    row("linux.resources.network", Ignored, "the VMM sends nothing of its own"),
    row("linux.resources.rdma", Ignored, "the VMM has no such device"),
    row("linux.resources.unified", Applied, "on cgroup v2, as written; on v1 a warning names what has no effect"),

    row("vm", Refused(|_, _| Some("kernel, disks and parameters come with the image".into())), "kernel and disks come with the image"),
    row("solaris", Refused(|_, _| Some("this is Linux".into())), "another platform"),
    row("windows", Refused(|_, _| Some("this is Linux".into())), "another platform"),
    row("zos", Refused(|_, _| Some("this is Linux".into())), "another platform"),
    row("freebsd", Refused(|_, _| Some("this is Linux".into())), "another platform"),
];

fn not_root(value: &Value, _spec: &Value) -> Option<String> {
    let id = value.as_u64()?;
    (id != 0).then(|| format!("id {id} cannot be set: users are the guest's own (remove --user)"))
}

fn user_namespace(value: &Value, _spec: &Value) -> Option<String> {
    let user = value.as_array()?.iter().any(|namespace| namespace.get("type").is_some_and(|name| name == "user"));
    user.then(|| "the VMM has a user id of its own, a user namespace cannot be given".into())
}

/// What ctr, nerdctl and CRI set by themselves.
const USUAL: [&str; 5] = ["PATH", "TERM", "HOSTNAME", "HOME", "container"];

/// Names only: values may be secrets.
fn environment(value: &Value) -> Option<String> {
    let names: Vec<&str> = value
        .as_array()?
        .iter()
        .filter_map(Value::as_str)
        .map(|variable| variable.split_once('=').map_or(variable, |(name, _)| name))
        .filter(|name| !USUAL.contains(name))
        .collect();
    (!names.is_empty()).then(|| {
        format!("the image has no agent, so these environment variables do not reach the guest: {}", names.join(", "))
    })
}

fn sysctl(value: &Value) -> Option<String> {
    let names: Vec<&str> = value.as_object()?.keys().map(String::as_str).collect();
    Some(format!("sysctls of the spec do not reach the guest, whose kernel is its own: {}", names.join(", ")))
}
