//! What went wrong, as one line and an exit code.
//!
//! The codes are those of sysexits(3), so a script can tell bad input from a full disk; 2 is clap's own for usage.

use std::error::Error;
use std::io;
use std::process::ExitCode;

use ovms_artifact::build::BuildError;
use ovms_artifact::layout::LayoutError;
use ovms_artifact::manifest::ManifestError;
use ovms_engine::Kind;
use ovms_registry::RegistryError;

/// Shown under `ovm --help`.
pub const EXIT_CODES: &str = "Exit codes: 0 done, 2 wrong usage, 65 invalid input, 66 input not found, \
                              69 something the host lacks, 70 a fault of ovms, 73 output cannot be made, \
                              74 read or write error, 75 not now (in use), 77 not permitted; \
                              of `ovm run` that of the guest";

const DATA: u8 = 65;
const NO_INPUT: u8 = 66;
const UNAVAILABLE: u8 = 69;
const INTERNAL: u8 = 70;
const CANNOT_CREATE: u8 = 73;
const IO: u8 = 74;
const NOT_NOW: u8 = 75;
const NO_PERMISSION: u8 = 77;

/// An error of a verb: its chain is printed once, its code is the program's.
#[derive(Debug)]
pub struct CliError {
    code: u8,
    source: Box<dyn Error + Send + Sync>,
}

impl CliError {
    /// Input that does not hold.
    pub fn invalid(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: DATA, source: source.into() }
    }

    /// The system refused something; its kind decides on the code.
    pub fn io(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let source = source.into();
        Self { code: io_code(source.as_ref()).unwrap_or(IO), source }
    }

    /// Bytes that could not be read, or that do not hold.
    fn io_or_invalid(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        let source = source.into();
        Self { code: io_code(source.as_ref()).unwrap_or(DATA), source }
    }

    /// Somebody who may not.
    pub fn not_permitted(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: NO_PERMISSION, source: source.into() }
    }

    /// A name that is taken.
    pub fn exists(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: CANNOT_CREATE, source: source.into() }
    }

    /// Nothing of that name.
    pub fn not_found(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: NO_INPUT, source: source.into() }
    }

    /// Somebody who should be there and is not.
    pub fn unavailable(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: UNAVAILABLE, source: source.into() }
    }

    /// Not as things are.
    pub fn not_now(source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self { code: NOT_NOW, source: source.into() }
    }

    /// What another process of ours has met: its chain and its code.
    pub fn other_process(code: u8, message: String) -> Self {
        Self { code, source: message.into() }
    }

    /// The program's exit code as a number.
    pub fn number(&self) -> u8 {
        self.code
    }

    /// The whole chain, `a: b: c`.
    pub fn chain(&self) -> String {
        ovms_proto::chain(self.source.as_ref())
    }

    /// The program's exit code.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

impl From<BuildError> for CliError {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Read { .. } => Self::io(error),
            BuildError::Layout(error) => Self::from(error),
            error => Self::invalid(error),
        }
    }
}

impl From<LayoutError> for CliError {
    fn from(error: LayoutError) -> Self {
        match error {
            LayoutError::Io { .. } => Self::io(error),
            LayoutError::UnknownName(_) => Self { code: NO_INPUT, source: error.into() },
            LayoutError::Occupied(_) => Self { code: CANNOT_CREATE, source: error.into() },
            error => Self::invalid(error),
        }
    }
}

impl From<RegistryError> for CliError {
    fn from(error: RegistryError) -> Self {
        let code = match &error {
            RegistryError::Layout(_) => return Self::io_or_invalid(error),
            RegistryError::NotFound(_) => NO_INPUT,
            RegistryError::Unauthorized(_) => NO_PERMISSION,
            RegistryError::Http { .. } | RegistryError::Status { .. } | RegistryError::Client { .. } => UNAVAILABLE,
            RegistryError::Setup(_) => IO,
            _ => DATA,
        };
        Self { code, source: error.into() }
    }
}

impl From<ManifestError> for CliError {
    fn from(error: ManifestError) -> Self {
        Self::invalid(error)
    }
}

impl From<ovms_bundle::Error> for CliError {
    fn from(error: ovms_bundle::Error) -> Self {
        match error {
            ovms_bundle::Error::Layout(error) => Self::from(error),
            ovms_bundle::Error::Io { .. } | ovms_bundle::Error::Worker { .. } => Self::io(error),
            ovms_bundle::Error::InUse { .. } => Self { code: NOT_NOW, source: error.into() },
            error => Self::invalid(error),
        }
    }
}

impl From<ovms_engine::Error> for CliError {
    fn from(error: ovms_engine::Error) -> Self {
        let code = match error.kind() {
            Kind::NotFound => NO_INPUT,
            Kind::AlreadyExists => CANNOT_CREATE,
            Kind::InvalidArgument => DATA,
            Kind::FailedPrecondition => NOT_NOW,
            Kind::Unavailable => UNAVAILABLE,
            Kind::Internal => INTERNAL,
        };
        Self { code, source: error.into() }
    }
}

/// The code of the first system error in a chain. Damaged bytes (a wrong digest) come as `InvalidData`.
fn io_code(error: &(dyn Error + Send + Sync + 'static)) -> Option<u8> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(match io.kind() {
                io::ErrorKind::NotFound => NO_INPUT,
                io::ErrorKind::PermissionDenied => NO_PERMISSION,
                io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => DATA,
                _ => IO,
            });
        }
        next = error.source();
    }
    None
}
