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

static unsigned field(unsigned index, unsigned binary)
{
    unsigned value = rtc(index);
    return binary ? value : (value >> 4) * 10 + (value & 15);
}

/* The time of day in seconds (MC146818: register B, bit 2: binary). Not of the minute alone: that looks as if no time
 * had passed once in thirty restores. The fields belong together, since ours reads the clock with the seconds. */
static unsigned now(unsigned binary)
{
    unsigned seconds = field(0, binary);
    return field(4, binary) * 3600 + field(2, binary) * 60 + seconds;
}

void run(void)
{
    touch(argument("fill", 1) << 20);
    uint64_t again = argument("touch", 0) << 20, stay = argument("stay", 0);
    unsigned binary = rtc(11) & 4, before = now(binary), after;
    print("waiting\n");
    for (; (after = now(binary)) == before || after == (before + 1) % 86400; before = after)
        relax();
    put('x');
    touch(again);
    if (stay)
        halt();
}
