/* Waits until it finds itself restored, then says one byte and powers off. A machine that stood still for more than a
 * second (in a snapshot) sees the real-time clock jump; take the snapshot, wait two seconds, then restore.
 *
 *   fill=MIB    writes that much memory from 16 MiB up before it waits (default 1)
 *   touch=MIB   writes so much of it again once restored (default 0)
 *   stay=1      halts then instead of powering off */
#include "guest.h"

#define FIRST 0x1000000ull
#define LARGE 0x200000ull

static void touch(uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes; at += LARGE) {
        volatile uint8_t *window = map(0, FIRST + at);
        for (unsigned offset = 0; offset < LARGE && at + offset < bytes; offset += 4096)
            window[offset]++;
    }
}

static unsigned rtc(unsigned index)
{
    outb(0x70, (uint8_t)index);
    return inb(0x71);
}

/* Seconds of the clock, 0 to 59 (MC146818: register B, bit 2: binary). */
static unsigned seconds(unsigned binary)
{
    unsigned value = rtc(0);
    return binary ? value : (value >> 4) * 10 + (value & 15);
}

void run(void)
{
    touch(argument("fill", 1) << 20);
    uint64_t again = argument("touch", 0) << 20, stay = argument("stay", 0);
    unsigned binary = rtc(11) & 4, before = seconds(binary), now;
    print("waiting\n");
    for (; (now = seconds(binary)) == before || now == (before + 1) % 60; before = now)
        relax();
    put('x');
    touch(again);
    if (stay)
        halt();
}
