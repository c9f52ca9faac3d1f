"""Everything the end-to-end tests need around ovms: real containerds, guest images and a nested KVM host.

Each module makes one kind of thing and keeps it in the cache (see `cache`), so that a fresh
machine needs nothing but `make` and a second run makes nothing again.
"""
