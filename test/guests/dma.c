/* Counts at 24 MiB, and has the disk write each count to 20 MiB, where no processor ever writes: a copy of memory that
 * misses what devices write is found out. Says "dma" when it has begun; the power button ends it. */
#include "blk.h"

#define FROM 0x1800000ull
#define TO 0x1400000ull
#define END 0x3000000ull
#define PAGE 4096

void run(void)
{
    blk_start();
    /* So that there is something to copy. */
    for (uint64_t page = FROM + PAGE; page < END; page += PAGE)
        *(volatile uint64_t *)page = page;
    for (uint64_t count = 1;; count++) {
        *(volatile uint64_t *)FROM = count;
        blk_buffer = (void *)FROM;
        blk_request(1, 8);
        blk_buffer = (void *)TO;
        blk_request(0, 8);
        if (count == 3)
            print("dma\n");
        if (inw(PM1_STATUS) & (1 << 8)) {
            outw(PM1_STATUS, 1 << 8);
            return;
        }
    }
}
