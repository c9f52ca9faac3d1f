/* A virtio-pci driver of the smallest kind for devices of a few queues: polled, without interrupts. */
#ifndef VIRTIO_H
#define VIRTIO_H

#include "guest.h"
#include "pci.h"

#define QUEUE 8
#define QUEUES 4

struct descriptor { uint64_t address; uint32_t length; uint16_t flags, next; };
#define NEXT 1  /* another descriptor follows */
#define WRITE 2 /* the device writes */

struct queue {
    struct descriptor descriptors[QUEUE] __attribute__((aligned(16)));
    volatile struct { uint16_t flags, index, ring[QUEUE]; } available __attribute__((aligned(16)));
    volatile struct {
        uint16_t flags, index;
        struct { uint32_t id, length; } ring[QUEUE];
    } used __attribute__((aligned(16)));
    volatile uint16_t *notify;
    uint16_t number;
};

/* struct virtio_pci_common_cfg (virtio 1.2, 4.1.4.3) */
struct common {
    uint32_t device_feature_select, device_feature, driver_feature_select, driver_feature;
    uint16_t config_msix_vector, queues;
    uint8_t status, generation;
    uint16_t queue_select, queue_size, queue_msix_vector, queue_enable, queue_notify_off;
    uint32_t descriptors[2], driver[2], device[2];
};

static struct queue queues[QUEUES];
/* The device's configuration, if it has one. */
static volatile void *config;

static void virtio_fail(const char *what)
{
    print("virtio: ");
    print(what);
    print("\n");
    power_off();
}

/* Has the device do a chain of `count` descriptors; gives the bytes that it has written. */
static uint32_t virtio_request(unsigned number, unsigned count)
{
    struct queue *queue = &queues[number];
    for (unsigned i = 0; i < count; i++) {
        queue->descriptors[i].next = (uint16_t)(i + 1);
        if (i + 1 < count)
            queue->descriptors[i].flags |= NEXT;
    }
    uint16_t before = queue->used.index;
    queue->available.ring[queue->available.index % QUEUE] = 0;
    __asm__ volatile("" ::: "memory");
    queue->available.index++;
    *queue->notify = queue->number;
    for (unsigned i = 0; i < 50000000 && queue->used.index == before; i++)
        relax();
    if (queue->used.index == before)
        virtio_fail("no answer");
    return queue->used.ring[before % QUEUE].length;
}

/* Makes the first device with this PCI id ready, with `count` queues and those of `features` that it offers; does not
 * return if there is none. */
static void virtio_start(unsigned device, uint32_t features, unsigned count)
{
    unsigned slot = pci_find(0x1af4, device);
    if (slot == 32)
        virtio_fail("no such device");
    pci_enable(slot);
    volatile struct common *common = 0;
    uint64_t notify = 0;
    uint32_t multiplier = 0;
    for (unsigned at = pci_read(slot, 0x34) & 0xfc; at; at = pci_read(slot, at + 1) & 0xfc) {
        if ((pci_read(slot, at) & 0xff) != 9)
            continue;
        unsigned type = pci_read(slot, at + 3) & 0xff, bar = pci_read(slot, at + 4) & 0xff;
        uint64_t address = pci_bar(slot, bar) + pci_read(slot, at + 8);
        if (type == 1)
            common = map(0, address);
        if (type == 2) {
            notify = address;
            multiplier = pci_read(slot, at + 16);
        }
        if (type == 4)
            config = map(2, address);
    }
    if (!common || !notify)
        virtio_fail("no capabilities");
    common->status = 0;
    while (common->status)
        relax();
    common->status = 1;
    common->status = 3;
    common->device_feature_select = 0;
    features &= common->device_feature;
    common->driver_feature_select = 0;
    common->driver_feature = features;
    common->driver_feature_select = 1;
    common->driver_feature = 1; /* VIRTIO_F_VERSION_1 */
    common->status = 11;
    if (!(common->status & 8))
        virtio_fail("features refused");
    for (unsigned number = 0; number < count; number++) {
        struct queue *queue = &queues[number];
        common->queue_select = (uint16_t)number;
        common->queue_size = QUEUE;
        common->queue_msix_vector = 0xffff;
        common->descriptors[0] = (uint32_t)(uint64_t)queue->descriptors;
        common->descriptors[1] = 0;
        common->driver[0] = (uint32_t)(uint64_t)&queue->available;
        common->driver[1] = 0;
        common->device[0] = (uint32_t)(uint64_t)&queue->used;
        common->device[1] = 0;
        queue->number = (uint16_t)number;
        queue->notify = map(1, notify + (uint64_t)common->queue_notify_off * multiplier);
        common->queue_enable = 1;
    }
    common->status = 15;
}

#endif
