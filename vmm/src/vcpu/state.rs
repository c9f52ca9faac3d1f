//! What a snapshot keeps of a processor.
