//! How many vCPUs and how much memory a machine gets: one pure function.

use ovms_config::settings::VmSettings;
use ovms_config::size::parse_size;
use ovms_config::vm::{MAX_MEMORY, MAX_VCPUS, MEMORY_STEP, MIN_MEMORY};

use crate::error::{Error, Kind, Result};

/// Annotation that gives the number of vCPUs.
pub const ANNOTATION_VCPUS: &str = "io.ovms.vcpus";
/// Annotation that gives the memory, with a unit.
pub const ANNOTATION_MEMORY: &str = "io.ovms.memory";
/// Annotation whose text is appended to the kernel command line.
pub const ANNOTATION_KERNEL_ARGS: &str = "io.ovms.kernel-args";

/// What is said about a machine's size, in falling precedence: flags of `ovm run`, limits of the spec, annotations,
/// image. What none of them says comes from the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `--cpus`.
    pub flag_vcpus: Option<u32>,
    /// `--memory` in bytes.
    pub flag_memory: Option<u64>,
    /// `memory.limit` of the spec in bytes; 0 and below: none.
    pub spec_memory: Option<i64>,
    /// `cpu.quota` of the spec in microseconds; 0 and below: none.
    pub spec_cpu_quota: Option<i64>,
    /// `cpu.period` of the spec in microseconds; the kernel's default is 100,000.
    pub spec_cpu_period: Option<u64>,
    /// Text of [`ANNOTATION_VCPUS`].
    pub annotation_vcpus: Option<String>,
    /// Text of [`ANNOTATION_MEMORY`].
    pub annotation_memory: Option<String>,
    /// The image's default number of vCPUs.
    pub image_vcpus: Option<u32>,
    /// The image's default memory in bytes.
    pub image_memory: Option<u64>,
}

/// What a machine gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes, a multiple of 2 MiB.
    pub memory: u64,
    /// Memory limit of the VMM's cgroup in bytes: the limit as it was asked for plus the overhead.
    pub cgroup_memory: u64,
}

/// Period of the kernel's CPU bandwidth control where the spec names none, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// Decides. Memory is rounded down to 2 MiB; a CPU limit of 1.5 gives 2 vCPUs.
///
/// # Errors
/// [`Kind::InvalidArgument`], naming who asked for what is not possible.
pub fn settle(wishes: &Wishes, settings: &VmSettings) -> Result<Size> {
    let vcpus = vcpus(wishes, settings)?;
    let (asked, who) = memory(wishes, settings)?;
    let memory = asked - asked % MEMORY_STEP;
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&memory) {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!("{who} asks for {asked} bytes of memory; a machine has 32 MiB to 1 TiB"),
        ));
    }
    Ok(Size { vcpus, memory, cgroup_memory: cgroup_memory(asked, settings.overhead) })
}

/// Decides for a machine that resumes: what was saved stays as it was, wishes go to its cgroup alone.
///
/// # Errors
/// [`Kind::FailedPrecondition`] for a limit below the memory that the machine has, naming who asked; as [`settle`].
pub fn settle_resumed(wishes: &Wishes, settings: &VmSettings, vcpus: u32, saved: u64) -> Result<Size> {
    if !(MIN_MEMORY..=MAX_MEMORY).contains(&saved) || !saved.is_multiple_of(MEMORY_STEP) || vcpus > MAX_VCPUS {
        let message =
            format!("the RAM snapshot is of a machine of {vcpus} vCPUs and {saved} bytes, which this VMM does not run");
        return Err(Error::new(Kind::InvalidArgument, message));
    }
    let asked = memory(&Wishes { image_memory: Some(saved), ..wishes.clone() }, settings)?;
    let (limit, who) = asked;
    if limit < saved {
        let message = format!(
            "{who} allows {limit} bytes of memory, the machine in the RAM snapshot has {saved}: allow as much, or boot it \
             with the annotation io.ovms.boot=cold"
        );
        return Err(Error::new(Kind::FailedPrecondition, message));
    }
    Ok(Size { vcpus, memory: saved, cgroup_memory: cgroup_memory(limit, settings.overhead) })
}

/// Memory limit of the VMM's cgroup for a machine that may have `limit` bytes: without the overhead the VMM would be
/// killed when its guest has used what it was given.
pub(crate) fn cgroup_memory(limit: u64, overhead: u64) -> u64 {
    limit.saturating_add(overhead)
}

fn vcpus(wishes: &Wishes, settings: &VmSettings) -> Result<u32> {
    let quota = wishes.spec_cpu_quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
    let (number, who) = if let Some(number) = wishes.flag_vcpus {
        (u64::from(number), "--cpus")
    } else if let Some(quota) = quota {
        let period = wishes.spec_cpu_period.filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD);
        (quota.div_ceil(period), "the spec's CPU limit")
    } else if let Some(text) = &wishes.annotation_vcpus {
        let number = text.trim().parse().map_err(|_| {
            Error::new(Kind::InvalidArgument, format!("annotation {ANNOTATION_VCPUS} is {text:?}, not a number"))
        })?;
        (number, "annotation io.ovms.vcpus")
    } else if let Some(number) = wishes.image_vcpus {
        (u64::from(number), "the image")
    } else {
        (u64::from(settings.vcpus), "the settings file")
    };
    u32::try_from(number).ok().filter(|number| (1..=MAX_VCPUS).contains(number)).ok_or_else(|| {
        Error::new(Kind::InvalidArgument, format!("{who} asks for {number} vCPUs; a machine has 1 to {MAX_VCPUS}"))
    })
}

fn memory(wishes: &Wishes, settings: &VmSettings) -> Result<(u64, &'static str)> {
    if let Some(bytes) = wishes.flag_memory {
        return Ok((bytes, "--memory"));
    }
    let limit = wishes.spec_memory.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0);
    if let Some(limit) = limit {
        // Clients write "no limit" as the largest page-aligned number too.
        if limit < (i64::MAX as u64) - 0xffff {
            return Ok((limit, "the spec's memory limit"));
        }
    }
    if let Some(text) = &wishes.annotation_memory {
        let bytes = parse_size(text).map_err(|err| {
            Error::new(Kind::InvalidArgument, format!("annotation {ANNOTATION_MEMORY} is no size")).because(err)
        })?;
        return Ok((bytes, "annotation io.ovms.memory"));
    }
    Ok(match wishes.image_memory {
        Some(bytes) => (bytes, "the image"),
        None => (settings.memory, "the settings file"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn all() -> Wishes {
        Wishes {
            flag_vcpus: Some(6),
            flag_memory: Some(200 * MIB),
            spec_memory: Some(300 * MIB as i64),
            spec_cpu_quota: Some(350_000),
            spec_cpu_period: Some(100_000),
            annotation_vcpus: Some("3".into()),
            annotation_memory: Some("400M".into()),
            image_vcpus: Some(5),
            image_memory: Some(600 * MIB),
        }
    }

    #[test]
    fn precedence_is_flag_spec_annotation_image_settings() {
        let settings = VmSettings::default();
        let mut wishes = all();
        let mut seen = Vec::new();
        let drops: [fn(&mut Wishes); 5] = [
            |_| (),
            |w| (w.flag_memory, w.flag_vcpus) = (None, None),
            |w| (w.spec_memory, w.spec_cpu_quota) = (None, None),
            |w| (w.annotation_memory, w.annotation_vcpus) = (None, None),
            |w| (w.image_memory, w.image_vcpus) = (None, None),
        ];
        for drop in drops {
            drop(&mut wishes);
            let size = settle(&wishes, &settings).unwrap();
            assert_eq!(size.cgroup_memory, size.memory + settings.overhead);
            seen.push((size.vcpus, size.memory / MIB));
        }
        assert_eq!(seen, [(6, 200), (4, 300), (3, 400), (5, 600), (1, 512)]);
    }

    #[test]
    fn an_odd_limit_is_rounded_down_for_the_guest_and_kept_for_the_cgroup() {
        let wishes = Wishes { spec_memory: Some((301 * MIB + 5) as i64), ..Wishes::default() };
        let size = settle(&wishes, &VmSettings::default()).unwrap();
        assert_eq!((size.memory, size.cgroup_memory), (300 * MIB, 365 * MIB + 5));
    }

    #[test]
    fn a_fraction_of_a_cpu_is_a_whole_vcpu() {
        for (quota, period, vcpus) in [(1, None, 1), (100_000, None, 1), (100_001, None, 2), (50_000, Some(25_000), 2)]
        {
            let wishes = Wishes { spec_cpu_quota: Some(quota), spec_cpu_period: period, ..Wishes::default() };
            assert_eq!(settle(&wishes, &VmSettings::default()).unwrap().vcpus, vcpus, "{quota}/{period:?}");
        }
    }

    #[test]
    fn no_limit_in_any_spelling_is_none() {
        for limit in [-1, 0, i64::MAX, i64::MAX - 4095] {
            let wishes = Wishes { spec_memory: Some(limit), spec_cpu_quota: Some(-1), ..Wishes::default() };
            let size = settle(&wishes, &VmSettings::default()).unwrap();
            assert_eq!((size.memory, size.vcpus), (512 * MIB, 1));
        }
    }

    #[test]
    fn a_resumed_machine_keeps_its_size_and_a_larger_limit_is_the_cgroups() {
        let settings = VmSettings::default();
        let spec = |limit: i64| Wishes { spec_memory: Some(limit), spec_cpu_quota: Some(50_000), ..Wishes::default() };
        let size = settle_resumed(&spec(0), &settings, 2, 256 * MIB).unwrap();
        assert_eq!((size.vcpus, size.memory, size.cgroup_memory), (2, 256 * MIB, 256 * MIB + settings.overhead));
        let size = settle_resumed(&spec(300 * MIB as i64), &settings, 2, 256 * MIB).unwrap();
        assert_eq!((size.memory, size.cgroup_memory), (256 * MIB, 300 * MIB + settings.overhead));
        let err = settle_resumed(&spec(255 * MIB as i64), &settings, 2, 256 * MIB).unwrap_err();
        assert_eq!(err.kind(), Kind::FailedPrecondition);
        assert!(err.to_string().contains("the spec's memory limit allows 267386880"), "{err}");
    }

    #[test]
    fn settle_resumed_odd_machine_returns_invalid_argument() {
        for (vcpus, memory) in [(33, 256 * MIB), (1, MIB), (1, 256 * MIB + 4096), (1, u64::MAX)] {
            let err = settle_resumed(&Wishes::default(), &VmSettings::default(), vcpus, memory).unwrap_err();
            assert_eq!(err.kind(), Kind::InvalidArgument);
        }
    }

    #[test]
    fn settle_impossible_wish_returns_who_asked() {
        let cases = [
            (Wishes { spec_memory: Some(8 << 20), ..Wishes::default() }, "the spec's memory limit asks for 8388608"),
            (Wishes { flag_memory: Some(1 << 20), ..Wishes::default() }, "--memory asks for 1048576"),
            (Wishes { annotation_memory: Some("lots".into()), ..Wishes::default() }, "io.ovms.memory is no size"),
            (Wishes { annotation_vcpus: Some("two".into()), ..Wishes::default() }, "io.ovms.vcpus is \"two\""),
            (Wishes { annotation_vcpus: Some("0".into()), ..Wishes::default() }, "asks for 0 vCPUs"),
            (Wishes { image_vcpus: Some(33), ..Wishes::default() }, "the image asks for 33 vCPUs"),
            (Wishes { image_memory: Some(u64::MAX), ..Wishes::default() }, "the image asks for"),
        ];
        for (wishes, expected) in cases {
            let err = settle(&wishes, &VmSettings::default()).unwrap_err();
            assert_eq!(err.kind(), Kind::InvalidArgument);
            assert!(err.chain().contains(expected), "{} lacks {expected}", err.chain());
        }
    }
}
