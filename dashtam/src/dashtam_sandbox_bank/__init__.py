"""A bank to try Dashtam with: OAuth 2.0, accounts and transactions, and faults on demand.

It is a sandbox. Whatever it knows is in memory and gone when it ends, everybody's password is "sandbox", and whoever
can reach it can switch everybody's faults.
"""

from dashtam_sandbox_bank.app import create_bank
from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.settings import BankSettings, InvalidSetting

__all__ = ["Bank", "BankSettings", "InvalidSetting", "create_bank"]
