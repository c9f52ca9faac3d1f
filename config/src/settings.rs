//! `ovms.toml`: what an operator sets for the whole host. Every key is optional; unknown keys are refused, so that a
//! misspelled limit is not silently no limit.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use serde::{Deserialize, Deserializer};
use thiserror::Error;

use crate::paths;
use crate::size::parse_size;

/// Why the settings cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file is there but cannot be read.
    #[error("cannot read the settings file {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML, or holds a key or value that ovms does not know.
    #[error("the settings file {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What the parser says, with line and column.
        #[source]
        source: Box<toml::de::Error>,
    },
}

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Where things are kept.
    pub paths: PathSettings,
    /// Defaults and costs of a machine.
    pub vm: VmSettings,
    /// The walls around a VMM.
    pub jail: JailSettings,
    /// What the snapshotter takes from an image.
    pub limits: LimitSettings,
    /// RAM snapshots.
    pub ram: RamSettings,
}

/// `[paths]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PathSettings {
    /// What must survive a reboot.
    pub state: PathBuf,
    /// What need not.
    pub runtime: PathBuf,
    /// Socket of the snapshots and diff services.
    pub snapshotter_socket: PathBuf,
    /// Socket of the bundle service.
    pub bundle_socket: PathBuf,
    /// containerd's socket.
    pub containerd_socket: PathBuf,
    /// The VMM; empty: beside the running program, then `PATH`.
    pub vmm: PathBuf,
    /// The hypervisor device.
    pub kvm: PathBuf,
}

impl Default for PathSettings {
    fn default() -> Self {
        Self {
            state: paths::STATE_DIR.into(),
            runtime: paths::RUNTIME_DIR.into(),
            snapshotter_socket: paths::SNAPSHOTTER_SOCKET.into(),
            bundle_socket: paths::BUNDLE_SOCKET.into(),
            containerd_socket: paths::CONTAINERD_SOCKET.into(),
            vmm: PathBuf::new(),
            kvm: "/dev/kvm".into(),
        }
    }
}

/// `[vm]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VmSettings {
    /// vCPUs of a machine for which neither the spec nor the image says a number.
    pub vcpus: u32,
    /// Its memory in bytes; the file writes it with a unit (`memory = "512M"`).
    #[serde(deserialize_with = "size")]
    pub memory: u64,
    /// Bytes that the VMM may use beyond its guest's memory: added to the cgroup's memory limit.
    #[serde(deserialize_with = "size")]
    pub overhead: u64,
    /// Seconds between a power-button press (SIGTERM) of `ovm run` and the end by force.
    pub stop_timeout_seconds: u32,
}

impl Default for VmSettings {
    fn default() -> Self {
        Self { vcpus: 1, memory: 512 << 20, overhead: 64 << 20, stop_timeout_seconds: 30 }
    }
}

/// `[jail]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JailSettings {
    /// First of the user and group ids that VMMs run under; each machine has one of its own.
    pub uid_base: u32,
    /// How many of them.
    pub uid_count: u32,
}

impl Default for JailSettings {
    fn default() -> Self {
        // Above the ids of login users (below 60,000), of systemd's dynamic users (61,184..65,519), of the usual
        // subuid ranges (100,000..600,100,000) and of systemd-nspawn (524,288..1,879,048,191).
        Self { uid_base: 1_900_000_000, uid_count: 65_536 }
    }
}

/// `[limits]`: bounds on what an image may ask of the host.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitSettings {
    /// The largest virtual disk in bytes.
    #[serde(deserialize_with = "size")]
    pub disk_virtual: u64,
    /// The most bytes that one disk layer may hold once unpacked.
    #[serde(deserialize_with = "size")]
    pub layer_data: u64,
    /// The most bytes that one byte of a compressed layer may become.
    pub layer_ratio: u64,
    /// The largest kernel or initrd in bytes.
    #[serde(deserialize_with = "size")]
    pub boot_file: u64,
    /// The most bytes of disk that unpacked images of `ovm run` take; those that were not used for longest go first.
    #[serde(deserialize_with = "size")]
    pub run_cache: u64,
}

impl Default for LimitSettings {
    fn default() -> Self {
        Self { disk_virtual: 64 << 40, layer_data: 1 << 40, layer_ratio: 2000, boot_file: 1 << 30, run_cache: 64 << 30 }
    }
}

/// `[ram]`: RAM snapshots, which hold somebody's secrets and decide what a guest's processor does next.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RamSettings {
    /// Whether images that carry RAM are resumed.
    pub policy: RamPolicy,
    /// The most bytes of tmpfs that RAM whose manifest asks for it (`preload_hint`) may take; what does not fit lies on
    /// disk.
    #[serde(deserialize_with = "size")]
    pub preload_budget: u64,
    /// The most bytes of decoded memory that one RAM snapshot may have.
    #[serde(deserialize_with = "size")]
    pub max_memory: u64,
}

impl Default for RamSettings {
    fn default() -> Self {
        Self { policy: RamPolicy::Allow, preload_budget: 1 << 30, max_memory: 256 << 30 }
    }
}

/// What the host makes of RAM that comes with an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RamPolicy {
    /// It is resumed.
    #[default]
    Allow,
    /// Only signed RAM is resumed. Signatures are not verified yet, so this refuses all.
    Signed,
    /// None is resumed.
    Deny,
}

impl Settings {
    /// Reads the file that [`paths::CONFIG_ENV`] names, or [`paths::CONFIG`]; a missing default file means defaults,
    /// a missing named file is an error.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn load() -> Result<Self, SettingsError> {
        match env::var_os(paths::CONFIG_ENV) {
            Some(path) => Self::read(Path::new(&path)),
            None if Path::new(paths::CONFIG).exists() => Self::read(Path::new(paths::CONFIG)),
            None => Ok(Self::default()),
        }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        let text = fs::read_to_string(path).map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text).map_err(|source| SettingsError::Parse { path: path.to_owned(), source: Box::new(source) })
    }
}

/// A number of bytes, or a text with a unit.
fn size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    match Size::deserialize(from)? {
        Size::Bytes(bytes) => Ok(bytes),
        Size::Text(text) => parse_size(&text).map_err(serde::de::Error::custom),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_gives_the_defaults() {
        assert_eq!(toml::from_str::<Settings>("").unwrap(), Settings::default());
    }

    #[test]
    fn the_shipped_file_gives_the_defaults() {
        let shipped = include_str!("../ovms.toml");
        assert_eq!(toml::from_str::<Settings>(shipped).unwrap(), Settings::default());
        let uncommented: String = shipped.lines().map(|line| line.strip_prefix("#= ").unwrap_or(line)).fold(
            String::new(),
            |mut all, line| {
                all.push_str(line);
                all.push('\n');
                all
            },
        );
        assert_eq!(toml::from_str::<Settings>(&uncommented).unwrap(), Settings::default());
    }

    #[test]
    fn sizes_take_units() {
        let settings: Settings = toml::from_str("[vm]\nmemory = \"2GiB\"\noverhead = 1048576\n").unwrap();
        assert_eq!((settings.vm.memory, settings.vm.overhead), (2 << 30, 1 << 20));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let err = toml::from_str::<Settings>("[vm]\nmemroy = \"2G\"\n").unwrap_err();
        assert!(err.to_string().contains("memroy"), "{err}");
    }
}
