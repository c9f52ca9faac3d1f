/* Prints a tick for ever; the ACPI power button makes it power off. `quiet=1` prints only the first tick. */
#include "guest.h"

void run(void)
{
    uint64_t quiet = argument("quiet", 0);
    uint64_t period = argument("period", 20000);
    print("spin\n");
    for (uint64_t tick = 0;; tick++) {
        if (!quiet || !tick) {
            print("tick ");
            print_decimal(tick);
            print("\n");
        }
        for (uint64_t i = 0; i < period; i++) {
            if ((i & 0xfff) == 0 && (inw(PM1_STATUS) & (1 << 8))) {
                outw(PM1_STATUS, 1 << 8);
                print("power button\n");
                return;
            }
            relax();
        }
    }
}
