"""End-to-end tests of ovms: real containerds, real images, real guests."""
