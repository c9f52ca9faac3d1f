//! KVM's structures in saved state: the hexadecimal digits of their bytes, without the zeroes at the end. A list of numbers,
//! as kvm-bindings would write them, takes three times as long to read, and reading it lies on the way to a restored
//! guest's first instruction.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Writes `value`.
pub(super) fn serialize<T: IntoBytes + Immutable, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    let bytes = value.as_bytes();
    let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last.saturating_add(1));
    to.serialize_str(&hex::encode(bytes.get(..end).unwrap_or(bytes)))
}

/// Reads a value; any bytes are one.
pub(super) fn deserialize<'de, T: FromBytes, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    from.deserialize_str(Digits(PhantomData))
}

struct Digits<T>(PhantomData<T>);

impl<T: FromBytes> Visitor<'_> for Digits<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hexadecimal digits of at most {} bytes", size_of::<T>())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        let mut bytes = vec![0u8; size_of::<T>()];
        let begin = bytes.get_mut(..text.len() / 2).ok_or_else(|| E::invalid_length(text.len(), &self))?;
        hex::decode_to_slice(text, begin).map_err(E::custom)?;
        T::read_from_bytes(&bytes).map_err(|_| E::custom("the bytes of another structure"))
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_mp_state;
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Saved(#[serde(with = "super")] kvm_mp_state);

    #[test]
    fn value_is_the_same_after_its_digits() {
        for (mp_state, digits) in [(0, "\"\""), (3, "\"03\""), (0x0100_0000, "\"00000001\"")] {
            let saved = Saved(kvm_mp_state { mp_state });
            assert_eq!(serde_json::to_string(&saved).unwrap(), digits);
            assert_eq!(serde_json::from_str::<Saved>(digits).unwrap(), saved);
        }
    }

    #[test]
    fn digits_too_many_or_odd_or_none_return_an_error() {
        for digits in ["\"0000000000\"", "\"000\"", "\"zz\"", "7", "[1]"] {
            assert!(serde_json::from_str::<Saved>(digits).is_err(), "{digits}");
        }
    }
}
