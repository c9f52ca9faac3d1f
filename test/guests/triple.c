/* Touches memory that is not mapped, without an interrupt table: page fault, double fault, triple fault. */
#include "guest.h"

void run(void)
{
    static const struct __attribute__((packed)) { uint16_t limit; uint64_t base; } none = {0, 0};
    print("triple fault\n");
    __asm__ volatile("lidt %0" ::"m"(none));
    (void)*(volatile uint8_t *)(8ULL << 30);
    halt();
}
