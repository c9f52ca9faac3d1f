/* A virtio-blk driver of the smallest kind: one request at a time. */
#ifndef BLK_H
#define BLK_H

#include "virtio.h"

#define VIRTIO_BLK_F_FLUSH (1 << 9)

static struct { uint32_t type, reserved; uint64_t sector; } header;
static uint8_t data[512];
/* Where requests read from and write to. */
static void *blk_buffer = data;
static volatile uint8_t status;

/* Type 0 reads into the buffer, 1 writes it, 4 flushes. */
static void blk_request(uint32_t type, uint64_t sector)
{
    struct descriptor *descriptors = queues[0].descriptors;
    unsigned last = type == 4 ? 1 : 2;
    header.type = type;
    header.sector = sector;
    status = 0xff;
    descriptors[0] = (struct descriptor){(uint64_t)&header, 16, 0, 0};
    descriptors[1] = (struct descriptor){(uint64_t)blk_buffer, 512, type == 0 ? WRITE : 0, 0};
    descriptors[last] = (struct descriptor){(uint64_t)&status, 1, WRITE, 0};
    virtio_request(0, last + 1);
    if (status != 0)
        virtio_fail("the disk failed a request");
}

/* Makes the first disk ready; does not return if there is none. */
static void blk_start(void)
{
    virtio_start(0x1042, VIRTIO_BLK_F_FLUSH, 1);
}

#endif
