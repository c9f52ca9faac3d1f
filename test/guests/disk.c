/* Reads sector 0 of the first disk and prints it up to its first zero, writes a pattern to the sector that `sector=`
 * names (default 1), flushes (not with `flush=0`), reads it back. With `then=` it waits for a byte on COM1 and does the
 * same to that sector; with `wait=1` it waits for another one at the end. */
#include "blk.h"

static void check(uint64_t sector)
{
    for (unsigned i = 0; i < 512; i++)
        data[i] = (uint8_t)(i * 7 + 3);
    blk_request(1, sector);
    if (argument("flush", 1))
        blk_request(4, 0);
    for (unsigned i = 0; i < 512; i++)
        data[i] = 0;
    blk_request(0, sector);
    for (unsigned i = 0; i < 512; i++)
        if (data[i] != (uint8_t)(i * 7 + 3))
            virtio_fail("the pattern did not come back");
    print("disk good\n");
}

static void wait_byte(void)
{
    while (!(inb(COM1 + 5) & 1))
        relax();
    inb(COM1);
}

void run(void)
{
    blk_start();
    blk_request(0, 0);
    print("sector 0: ");
    for (unsigned i = 0; i < 512 && data[i]; i++)
        put((char)data[i]);
    print("\n");
    check(argument("sector", 1));
    uint64_t then = argument("then", 0);
    if (then) {
        wait_byte();
        check(then);
    }
    if (argument("wait", 0))
        wait_byte();
}
