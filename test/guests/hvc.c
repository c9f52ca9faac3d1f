/* virtio-console: tells its size on COM1 and says a line on itself, from two buffers. With `echo=1` it then gives back
 * what comes in; `q` powers off. */
#include "virtio.h"

#define SIZE 1 /* VIRTIO_CONSOLE_F_SIZE */
#define RECEIVE 0
#define TRANSMIT 1

static char typed[16];

static void say(unsigned at, const char *text, uint32_t length)
{
    queues[TRANSMIT].descriptors[at] = (struct descriptor){(uint64_t)text, length, 0, 0};
}

void run(void)
{
    virtio_start(0x1043, SIZE, 2);
    volatile uint16_t *size = config;
    print("console ");
    print_decimal(size[0]);
    print("x");
    print_decimal(size[1]);
    print("\n");
    say(0, "hello ", 6);
    say(1, "from hvc0\n", 10);
    virtio_request(TRANSMIT, 2);
    while (argument("echo", 0)) {
        queues[RECEIVE].descriptors[0] = (struct descriptor){(uint64_t)typed, sizeof(typed), WRITE, 0};
        uint32_t length = virtio_request(RECEIVE, 1);
        say(0, typed, length);
        virtio_request(TRANSMIT, 1);
        for (uint32_t i = 0; i < length; i++)
            if (typed[i] == 'q')
                return;
    }
}
