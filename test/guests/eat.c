/* Writes to every page of RAM above 16 MiB, so that the host has to find memory for all of it. */
#include "guest.h"

void run(void)
{
    struct range range;
    print("eating\n");
    for (unsigned i = 0; memory_range(i, &range); i++) {
        if (range.type != 1)
            continue;
        for (uint64_t large = range.address & ~0x1fffffull; large < range.address + range.size; large += 0x200000) {
            volatile uint8_t *window = map(0, large);
            for (unsigned offset = 0; large >= 0x1000000 && offset < 0x200000; offset += 4096)
                window[offset] = 1;
        }
    }
    print("eaten\n");
}
