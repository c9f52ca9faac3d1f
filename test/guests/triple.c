/* Takes an exception without an interrupt table: a triple fault. */
#include "guest.h"

void run(void)
{
    static const struct __attribute__((packed)) { uint16_t limit; uint64_t base; } none = {0, 0};
    print("triple fault\n");
    __asm__ volatile("lidt %0; int3" ::"m"(none));
    halt();
}
