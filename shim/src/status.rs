//! Errors as ttrpc statuses: containerd's errdefs know an error by its code alone.

use ttrpc::proto::Code;

use crate::error::{Error, Kind};

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(code(error.kind()), error.chain()))
    }
}

fn code(kind: Kind) -> Code {
    match kind {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::Invalid => Code::INVALID_ARGUMENT,
        Kind::Precondition => Code::FAILED_PRECONDITION,
        Kind::Unimplemented => Code::UNIMPLEMENTED,
        Kind::Unavailable => Code::UNAVAILABLE,
        Kind::Internal => Code::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_code_and_the_chain_is_the_message() {
        let kinds = [
            (Kind::NotFound, Code::NOT_FOUND),
            (Kind::AlreadyExists, Code::ALREADY_EXISTS),
            (Kind::Invalid, Code::INVALID_ARGUMENT),
            (Kind::Precondition, Code::FAILED_PRECONDITION),
            (Kind::Unimplemented, Code::UNIMPLEMENTED),
            (Kind::Unavailable, Code::UNAVAILABLE),
            (Kind::Internal, Code::INTERNAL),
        ];
        for (kind, expected) in kinds {
            let error = Error::caused("outer", std::io::Error::other("inner")).of_kind(kind);
            let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else { panic!("not a status") };
            assert_eq!(status.code(), expected);
            assert_eq!(status.message, "outer: inner");
        }
    }
}
