/* A virtio-blk driver of the smallest kind: one request at a time, polled, without interrupts. */
#ifndef BLK_H
#define BLK_H

#include "guest.h"
#include "pci.h"

#define QUEUE 8

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
struct available { uint16_t flags, index, ring[QUEUE]; };
struct used { uint16_t flags, index; struct { uint32_t id, length; } ring[QUEUE]; };

/* struct virtio_pci_common_cfg (virtio 1.2, 4.1.4.3) */
struct common {
    uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
    uint16_t config_msix_vector, queues;
    uint8_t status, generation;
    uint16_t queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_off;
    uint32_t descriptors[2], driver[2], device[2];
};

static struct descriptor descriptors[QUEUE] __attribute__((aligned(4096)));
static volatile struct available available __attribute__((aligned(4096)));
static volatile struct used used __attribute__((aligned(4096)));
static struct { uint32_t type, reserved; uint64_t sector; } header;
static uint8_t data[512];
/* Where requests read from and write to. */
static void *blk_buffer = data;
static volatile uint8_t status;
static volatile uint16_t *notify;

static void blk_fail(const char *what)
{
    print("disk: ");
    print(what);
    print("\n");
    power_off();
}

/* Type 0 reads into the buffer, 1 writes it, 4 flushes. */
static void blk_request(uint32_t type, uint64_t sector)
{
    unsigned last = type == 4 ? 1 : 2;
    header.type = type;
    header.sector = sector;
    status = 0xff;
    descriptors[0] = (struct descriptor){(uint64_t)&header, 16, 1, 1};
    descriptors[1] = (struct descriptor){(uint64_t)blk_buffer, 512, type == 0 ? 3 : 1, 2};
    descriptors[last] = (struct descriptor){(uint64_t)&status, 1, 2, 0};
    uint16_t before = used.index;
    available.ring[available.index % QUEUE] = 0;
    __asm__ volatile("" ::: "memory");
    available.index++;
    *notify = 0;
    for (unsigned i = 0; i < 50000000 && used.index == before; i++)
        relax();
    if (used.index == before)
        blk_fail("no answer");
    if (status != 0)
        blk_fail("the request failed");
}

static volatile struct common *blk_find(unsigned slot)
{
    volatile struct common *common = 0;
    uint64_t notify_base = 0;
    uint32_t multiplier = 0;
    for (unsigned at = pci_read(slot, 0x34) & 0xfc; at; at = pci_read(slot, at + 1) & 0xfc) {
        if ((pci_read(slot, at) & 0xff) != 9)
            continue;
        unsigned type = pci_read(slot, at + 3) & 0xff, bar = pci_read(slot, at + 4) & 0xff;
        uint64_t address = pci_bar(slot, bar) + pci_read(slot, at + 8);
        if (type == 1)
            common = map(0, address);
        if (type == 2) {
            notify_base = address;
            multiplier = pci_read(slot, at + 16);
        }
    }
    if (!common || !notify_base)
        blk_fail("no virtio capabilities");
    common->queue_select = 0;
    notify = map(1, notify_base + (uint64_t)common->queue_notify_off * multiplier);
    return common;
}

static void blk_setup(volatile struct common *common)
{
    common->status = 0;
    while (common->status)
        relax();
    common->status = 1;
    common->status = 3;
    common->driver_feature_select = 0;
    common->driver_feature = 1 << 9; /* VIRTIO_BLK_F_FLUSH */
    common->driver_feature_select = 1;
    common->driver_feature = 1; /* VIRTIO_F_VERSION_1 */
    common->status = 11;
    if (!(common->status & 8))
        blk_fail("features refused");
    common->queue_select = 0;
    common->queue_size = QUEUE;
    common->queue_msix_vector = 0xffff;
    common->descriptors[0] = (uint32_t)(uint64_t)descriptors;
    common->descriptors[1] = 0;
    common->driver[0] = (uint32_t)(uint64_t)&available;
    common->driver[1] = 0;
    common->device[0] = (uint32_t)(uint64_t)&used;
    common->device[1] = 0;
    common->queue_enable = 1;
    common->status = 15;
}

/* Finds the first disk and makes it ready; does not return if there is none. */
static void blk_start(void)
{
    unsigned slot = pci_find(0x1af4, 0x1042);
    if (slot == 32)
        blk_fail("no virtio-blk");
    pci_enable(slot);
    blk_setup(blk_find(slot));
}

#endif
