/* virtio-balloon's free-page reporting: writes to each page of `fill=` MiB from 16 MiB on, says "filled" and waits for a
 * byte on COM1, reports all of it as free, says "reported" and waits again, then looks whether it reads as zeroes. */
#include "virtio.h"

#define REPORTING (1 << 5) /* VIRTIO_BALLOON_F_REPORTING */
/* Behind inflate and deflate, since statistics are not asked for. */
#define QUEUE_REPORTING 2
#define START 0x1000000ull
#define PAGE 4096
#define RANGE 0x200000

static void wait_byte(void)
{
    while (!(inb(COM1 + 5) & 1))
        relax();
    inb(COM1);
}

void run(void)
{
    uint64_t end = START + (argument("fill", 16) << 20);
    virtio_start(0x1045, REPORTING, 3);
    for (uint64_t page = START; page < end; page += PAGE)
        *(volatile uint64_t *)page = page;
    print("filled\n");
    wait_byte();
    for (uint64_t range = START; range < end;) {
        unsigned count = 0;
        for (; count < QUEUE && range < end; range += RANGE)
            queues[QUEUE_REPORTING].descriptors[count++] = (struct descriptor){range, RANGE, WRITE, 0};
        virtio_request(QUEUE_REPORTING, count);
    }
    print("reported\n");
    wait_byte();
    for (uint64_t page = START; page < end; page += PAGE)
        if (*(volatile uint64_t *)page) {
            print("a page has kept its content\n");
            return;
        }
    print("all zero\n");
}
