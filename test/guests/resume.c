/* Waits until it finds itself restored, then says one byte and powers off. It knows by its VM generation id, which lies in
 * memory: to look there is no exit, so the time to the byte is the machine's and not the guest's.
 *
 *   fill=MIB    writes that much memory from 16 MiB up before it waits (default 1)
 *   touch=MIB   writes so much of it again once restored (default 0)
 *   stay=1      halts then instead of powering off */
#include "guest.h"

#define FIRST 0x1000000ull
#define LARGE 0x200000ull
/* Where this VMM keeps it (VMGENID_PAGE of vmm/src/layout.rs); another guest asks ACPI. */
#define GENERATION_ID ((volatile const uint64_t *)0xff000)

static void touch(uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += LARGE) {
        volatile uint8_t *window = map(0, FIRST + at);
        for (unsigned offset = 0; offset < LARGE && at + offset < bytes; offset += 4096)
            window[offset]++;
    }
}

void run(void)
{
    touch(argument("fill", 1) << 20);
    uint64_t again = argument("touch", 0) << 20, stay = argument("stay", 0);
    volatile const uint64_t *generation = GENERATION_ID;
    uint64_t before = *generation;
    print("waiting\n");
    while (*generation == before)
        relax();
    put('x');
    touch(again);
    if (stay)
        halt();
}
