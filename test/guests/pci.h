/* Configuration mechanism #1 (ports 0xcf8 and 0xcfc) on bus 0, function 0. */
#ifndef PCI_H
#define PCI_H

#include "guest.h"

static inline uint32_t pci_read(unsigned slot, unsigned offset)
{
    outl(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
    return inl(0xcfc) >> (offset & 3) * 8;
}

static inline void pci_write(unsigned slot, unsigned offset, uint32_t value)
{
    outl(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
    outl(0xcfc, value);
}

/* The slot of the first function with this vendor and device; 32: there is none. */
static inline unsigned pci_find(unsigned vendor, unsigned device)
{
    unsigned slot = 0;
    while (slot < 32 && pci_read(slot, 0) != (device << 16 | vendor))
        slot++;
    return slot;
}

/* Where the firmware (the machine monitor) has placed a memory BAR. */
static inline uint64_t pci_bar(unsigned slot, unsigned bar)
{
    uint32_t low = pci_read(slot, 0x10 + 4 * bar);
    uint64_t high = (low & 6) == 4 ? pci_read(slot, 0x14 + 4 * bar) : 0;
    return high << 32 | (low & ~15u);
}

/* Memory decoding and bus mastering on. */
static inline void pci_enable(unsigned slot) { pci_write(slot, 4, (pci_read(slot, 4) & 0xffff) | 6); }

#endif
