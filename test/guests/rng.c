/* virtio-rng: draws twice and prints the first eight bytes of each as numbers. Powers off. */
#include "virtio.h"

static uint64_t drawn[2][8];

void run(void)
{
    virtio_start(0x1044, 0, 1);
    for (unsigned i = 0; i < 2; i++) {
        queues[0].descriptors[0] = (struct descriptor){(uint64_t)drawn[i], sizeof(drawn[i]), WRITE, 0};
        uint32_t length = virtio_request(0, 1);
        if (length == 0 || length > sizeof(drawn[i]))
            virtio_fail("a wrong length");
        print(i ? " " : "random ");
        print_hex(drawn[i][0]);
    }
    print("\n");
}
