/* Prints the memory map, then writes and reads back the first and the last page of every range of RAM above 1 MiB,
 * above 4 GiB too. */
#include "guest.h"

static int check(uint64_t physical)
{
    volatile uint64_t *word = map(0, physical);
    uint64_t before = *word;
    *word = physical ^ 0x5aa5f00dcafe1234;
    int good = *word == (physical ^ 0x5aa5f00dcafe1234);
    *word = before;
    return good;
}

void run(void)
{
    struct range range;
    uint64_t total = 0, top = 0;
    for (unsigned i = 0; memory_range(i, &range); i++) {
        print("map ");
        print_hex(range.address);
        print(" ");
        print_hex(range.size);
        print(" ");
        print_decimal(range.type);
        print("\n");
        if (range.type != 1)
            continue;
        total += range.size;
        if (range.address + range.size > top)
            top = range.address + range.size;
        if (range.address >= 0x100000 && !(check(range.address + 0x800000) && check(range.address + range.size - 8)))
            print("memory does not hold what is written\n");
    }
    print("ram ");
    print_decimal(total);
    print(" top ");
    print_hex(top);
    print("\n");
}
