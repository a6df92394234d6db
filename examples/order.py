"""Events of one account are handled in order; behind a dead one later ones wait. Run it: python examples/order.py"""

import asyncio
from decimal import Decimal

from sqlalchemy.ext.asyncio import async_sessionmaker

from whereupon import DomainEvent, EventBus, Retry


class MoneyWithdrawn(DomainEvent):
    account: str
    amount: Decimal


bus = EventBus("sqlite+aiosqlite:///:memory:")
sessions = async_sessionmaker(bus.engine)
ledger_is_open = False


@bus.subscribe(MoneyWithdrawn, ordered_by="account", retry=Retry(max_attempts=1))
async def book(event: MoneyWithdrawn) -> None:
    if event.account == "savings" and not ledger_is_open:
        raise ConnectionError("the ledger of the savings accounts is closed")
    print(f"booked {event.amount} from {event.account}")


async def main() -> None:
    global ledger_is_open
    async with bus:
        async with sessions.begin() as session:
            for amount in ("1.00", "2.00", "3.00"):
                await bus.publish(
                    MoneyWithdrawn(account="savings", amount=Decimal(amount)),
                    MoneyWithdrawn(account="checking", amount=Decimal(amount)),
                    session=session,
                )
        await bus.drain(10)
        for letter in await bus.operator.dead():
            print(f"dead: {letter.event_type} of {letter.key}: {letter.error_message}")
        ledger_is_open = True
        await bus.operator.retry("book", reason="the ledger is open again")
        await bus.drain(10)
    await bus.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
